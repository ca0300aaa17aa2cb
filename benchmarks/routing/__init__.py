"""Routers side by side on a cluster of several nodes."""
