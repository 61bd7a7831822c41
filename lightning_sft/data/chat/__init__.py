"""Conversations, as a chat template writes them."""
