"""Searches launch configurations."""
