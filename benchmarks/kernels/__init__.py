"""Times the kernels one by one."""
