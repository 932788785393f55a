"""The channel map as frozen data, and what it says in words."""
