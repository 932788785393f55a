"""The integers that ride along with tensors, and what a run records about them."""
