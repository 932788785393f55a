"""What the commands do, over the library; imported when one runs."""
