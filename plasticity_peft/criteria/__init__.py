"""What a score is: one short file for each measure."""
