"""Rows that are read and tokenised while training."""
