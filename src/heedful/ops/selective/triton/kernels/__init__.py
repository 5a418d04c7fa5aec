"""The kernels. Importing one needs Triton."""
