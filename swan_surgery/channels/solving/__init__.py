"""From recordings to units: components, pins, heads, and the frozen map."""
