"""Models for everyone else: Hugging Face folders."""
