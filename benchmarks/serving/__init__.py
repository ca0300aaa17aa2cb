"""A whole server over HTTP."""
