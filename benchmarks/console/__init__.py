"""The console in a real browser: where that comes from, and the picture of it in README.md."""
