"""Prompts in, generation records out."""
