"""Rows that need no network."""
