"""The kernels of CUDA devices, in Triton. Each has the guarantees of the one of its name beside this package."""
