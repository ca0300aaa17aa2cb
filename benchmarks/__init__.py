"""Benchmarks: each module prints a table with the machine's name and command, and can write JSON."""
