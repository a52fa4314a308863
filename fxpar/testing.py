"""What users check plans with: `assert_equivalent` compares a plan with the plain model."""

from fxpar.verify.equivalence import GRADIENT_TOLERANCE, LOSS_TOLERANCE, assert_equivalent

__all__ = ["GRADIENT_TOLERANCE", "LOSS_TOLERANCE", "assert_equivalent"]
