"""Reward functions: a response and its reference answer in, three numbers out."""
