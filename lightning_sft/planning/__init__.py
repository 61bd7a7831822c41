"""What a run needs, and which settings suit it, found out before it starts."""
