"""Hugging Face folders of trained models, and their model cards."""
