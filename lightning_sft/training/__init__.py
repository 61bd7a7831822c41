"""`SFTModule`: the loss, the optimizer step, checkpoints."""
