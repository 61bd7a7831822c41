"""The plan of optimizer steps, and loaders that hand them out."""
