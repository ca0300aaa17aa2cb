"""The engine's decode step and what disturbs it."""
