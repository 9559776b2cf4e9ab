"""From data to images: single images, pairs and batches, drawn by a seed."""
