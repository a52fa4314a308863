"""Triton kernels, for what Inductor cannot fuse; imported as ``fxpar.backends.kernels``."""
