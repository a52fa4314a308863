"""Checkpoints: what one plan saved loads under any other, and without fxpar.

save          `save_checkpoint`: every rank writes its share of the rectangles, at once or in the background
load          `load_checkpoint`
manager       `CheckpointManager`: numbered checkpoints of a whole run
huggingface   `export_safetensors`, `load_safetensors`
folder        how a folder is replaced as a whole, and nothing removed that no save wrote
manifest      the list of what a save wrote, with checksums
source        a folder that is held open, and checked, while it is read
staged        all is read before any of it is written to the model
part          one tensor, what this rank holds of it, and who writes it (rectangles: fxpar/sharding/chunks.py)
planners      rectangles as `torch.distributed.checkpoint` writes them
ranks         a model as one process holds it; one verdict on all ranks
target        which saved tensor fits which, and what a meta model lacks
optimizer     state and options by parameter name
"""

from fxpar.checkpoint.huggingface import export_safetensors, load_safetensors
from fxpar.checkpoint.load import load_checkpoint
from fxpar.checkpoint.manager import CheckpointManager
from fxpar.checkpoint.save import SaveHandle, save_checkpoint

__all__ = ["CheckpointManager", "SaveHandle", "export_safetensors", "load_checkpoint", "load_safetensors", "save_checkpoint"]
