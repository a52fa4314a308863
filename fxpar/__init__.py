"""fxpar: a PyTorch model written for one GPU, run on many, without an edit.

parallelize     the one line: a model and a `Plan` -> a `ParallelModule`
Plan            how a model is split over ranks
sampler         the data of this rank's replica
pad             batches of many lengths, as calls of few shapes
capture         a model traced once, for many plans
simulate        every rank of a plan in this process
inspect         what a plan does to a model, without running it
suggest         which plan to take for a number of GPUs, and why
host_time       what the host does in a step, from a profile
Meter           throughput, MFU and memory of a run
testing         `assert_equivalent`: a plan against the plain model
save_checkpoint, load_checkpoint        model and optimizer, under any plan or none
CheckpointManager       numbered checkpoints of a whole run
export_safetensors, load_safetensors    Hugging Face's files
"""

from fxpar.api import parallelize
from fxpar.checkpoint import (
    CheckpointManager,
    SaveHandle,
    export_safetensors,
    load_checkpoint,
    load_safetensors,
    save_checkpoint,
)
from fxpar.choose.suggest import Suggestions, suggest
from fxpar.compiler import Captured, capture, compile_program
from fxpar.errors import (
    CaptureError,
    CheckpointError,
    EquivalenceError,
    FxparError,
    InputError,
    MismatchError,
    PlanError,
    UnsupportedOperator,
)
from fxpar.model.padding import pad
from fxpar.plan import Plan
from fxpar.report.host import HostTime, host_time
from fxpar.report.report import Report, inspect
from fxpar.run.meter import Meter
from fxpar.run.module import ParallelModule
from fxpar.run.replica import sampler
from fxpar.verify import equivalence as testing
from fxpar.verify.simulation import Simulation, simulate

__version__ = "0.1.0"
__all__ = ["CaptureError", "Captured", "CheckpointError", "CheckpointManager", "EquivalenceError", "FxparError", "HostTime",
           "InputError", "Meter", "MismatchError", "ParallelModule", "Plan", "PlanError", "Report", "SaveHandle", "Simulation",
           "Suggestions", "UnsupportedOperator", "capture", "compile_program", "export_safetensors", "host_time", "inspect",
           "load_checkpoint", "load_safetensors", "pad", "parallelize", "sampler", "save_checkpoint", "simulate", "suggest",
           "testing"]
