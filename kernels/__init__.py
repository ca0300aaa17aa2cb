"""GPU kernels of the decode and prefill steps, each with a torch twin for CPU tensors.

Importing this package must stay safe anywhere (no CUDA, no Triton): other libraries probe for a top-level
module of this name. Import the submodule that you need.
"""
