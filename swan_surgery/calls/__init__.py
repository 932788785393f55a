"""The k-th call of a function in a model's code: found, counted, guarded, and changed."""
