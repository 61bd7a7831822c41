"""From rows to optimizer steps."""
