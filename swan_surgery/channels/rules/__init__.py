"""One rule per ATen operation: what it does to the labels of its tensors."""
