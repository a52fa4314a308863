"""What runs a program.

eager      node by node, as it stands; the reference, and for debugging
inductor   AOTAutograd and Inductor, with communication ordered beside computation (overlap) and bucketed (buckets)
simulate   every rank of a plan in one process, with gradients
runtime    process groups for the collectives, and the side channel on which ranks agree
transport  who moves parameters and gradients: NCCL, or copy engines (copies)
"""
