"""Running a model with its labels on: the dispatch mode, and tensors without data."""
