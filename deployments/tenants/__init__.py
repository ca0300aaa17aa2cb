"""Who asks, what they may use, and how much of it."""
