"""What training adds to its loss, and how gates learn from it."""
