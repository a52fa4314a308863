"""Kernels for GPUs, in Triton; imported where they run, as Triton is not everywhere.

flash     attention with counter-based dropout, forward and backward
"""
