"""What a model makes of each row of the data."""
