"""Benchmarks. The commands are decode, serving, kernels and serve_smoke, which print a table with the machine's name
and command and can write JSON; tune, which writes the kernels' table for a GPU; and plot, which draws what the first
three wrote."""
