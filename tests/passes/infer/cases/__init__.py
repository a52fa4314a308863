"""Random arguments for every operator that has a rule: `CASES[operator](gen)` gives ``(args, kwargs)``.

One file for each file of rules.
"""

from tests.passes.infer.cases import conv, experts, factory, index, matmul, pointwise, reduce, view
from tests.passes.infer.cases.registry import CASES, UNDEFINED

__all__ = ["CASES", "UNDEFINED", "conv", "experts", "factory", "index", "matmul", "pointwise", "reduce", "view"]
