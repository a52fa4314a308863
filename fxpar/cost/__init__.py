"""What a program takes on one rank, without running it.

operators   floating-point operations and bytes of every operator, from the shapes of its operands
"""
