"""What runs have left: read from a program, and several beside one another."""
