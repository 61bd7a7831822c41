"""How Lightning's loops see a run: all that touches the trainer's own settings and counters."""
