"""What runs a program.

eager      node by node, as it stands; the reference, and for debugging
inductor/  AOTAutograd and Inductor, with communication ordered beside computation and in buckets
simulate   every rank of a plan in lock step, with gradients
transport/ who moves parameters and gradients: process groups, or copy engines
trace      a program with tensor inputs alone, for AOTAutograd (with tables: embedding gradients)
remat      what the backward recomputes
stepped    a program's forward and backward as calls of their own, several microbatches in flight
split      a backward in two: input gradients, and weight gradients later
repeats    runs of equal blocks in a graph (periods: made shorter or longer)
"""
