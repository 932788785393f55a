"""A short way for easy inputs: switch layers and gated compression, put into a network that exists."""
