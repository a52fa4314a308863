"""Kernels for GPUs, in Triton; imported where they run, as Triton is not everywhere.

flash     attention with counter-based dropout, forward and backward
rows      zeros in the rows behind the last that counts
"""

import functools
import importlib.util


@functools.cache
def has_triton() -> bool:
    """Whether the modules of this package can be imported."""
    return importlib.util.find_spec("triton") is not None
