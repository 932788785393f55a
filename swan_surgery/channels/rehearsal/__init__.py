"""Does the model's own Python code follow a cut? Tried on a shell, and mended or pinned."""
