"""Channels out: the plan, the cut, its check, and the note of where a model comes from."""
