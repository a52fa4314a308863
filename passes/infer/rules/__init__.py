"""The operator rules: for each ATen operator, how the factors of its operands and outputs relate.

spec        what a rule says, and the einsum notation that most are written in
registry    the table operator -> rule; what has none runs replicated, and the report says so
pointwise   elementwise operators that PyTorch does not tag as such, dropout
matmul      products, lookups, attention
reduce      sums, means, softmax, norms, sorts
view        reshape, transpose, expand, repeat
index       slices, splits, concatenation, gather, scatter
factory     operators that make tensors
conv        convolution, pooling, resampling
experts     mixtures of experts, whose rows are in an order of their own
"""

from fxpar.passes.infer.rules import conv, experts, factory, index, matmul, pointwise, reduce, view
from fxpar.passes.infer.rules.registry import RULES, notation, rule, spec_for
from fxpar.passes.infer.rules.spec import Op, Operand, Spec, einsum

__all__ = [
    "RULES",
    "Op",
    "Operand",
    "Spec",
    "conv",
    "einsum",
    "experts",
    "factory",
    "index",
    "matmul",
    "notation",
    "pointwise",
    "reduce",
    "rule",
    "spec_for",
    "view",
]
