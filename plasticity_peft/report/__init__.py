"""From scores to a ranking, a selection, a table and a picture."""
