"""fxpar: a PyTorch model written for one GPU, run on many, without an edit.

parallelize     the one line: a model and a `Plan` -> a `ParallelModule`
Plan            how a model is split over ranks
simulate        every rank of a plan in this process
inspect         what a plan does to a model, without running it
testing         `assert_equivalent`: a plan against the plain model
"""

from fxpar import testing
from fxpar.api import parallelize
from fxpar.compiler import compile_program
from fxpar.errors import (
    CaptureError,
    EquivalenceError,
    FxparError,
    InputError,
    MismatchError,
    PlanError,
    UnsupportedOperator,
)
from fxpar.inspection import Report, inspect
from fxpar.module import ParallelModule
from fxpar.plan import Plan
from fxpar.simulation import Simulation, simulate

__version__ = "0.1.0"
__all__ = ["CaptureError", "EquivalenceError", "FxparError", "InputError", "MismatchError", "ParallelModule", "Plan",
           "PlanError", "Report", "Simulation", "UnsupportedOperator", "compile_program", "inspect", "parallelize",
           "simulate", "testing"]
