"""Which units stay: scores, limits, orders, and the widest mask within them."""
