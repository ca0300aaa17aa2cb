"""What it costs that every router knows where every adapter is, and how soon it knows."""
