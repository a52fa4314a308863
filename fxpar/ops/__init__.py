"""The operators that fxpar adds to ATen: plain differentiable functions that every backend can run.

kernels/ has what runs of them on GPUs alone.
"""
