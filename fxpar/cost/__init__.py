"""What a step costs: operators on one rank, and the machines that they run on.

operators  floating-point operations and bytes of every operator, from the shapes of its operands
stages     a pipeline's step on a cluster, from the programs of its stages
formulas   a step's seconds and bytes in closed form, by a plan's degrees
clusters   machines that models are trained on: `clusters/*.toml`, and their reader
"""
