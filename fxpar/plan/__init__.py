"""What a user asks for: the `Plan`, and the files and flags of Megatron Core that it can be made of."""

from fxpar.plan.files import SUFFIXES
from fxpar.plan.plan import Plan, Plans, require_one_of

__all__ = ["SUFFIXES", "Plan", "Plans", "require_one_of"]
