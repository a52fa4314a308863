"""What every rank of a test does first, done once in the process that ranks are forks of (see `tests.processes`).

The first capture imports much of torch. What is imported by then is left alone by Python's garbage collector: `parallelize` looks
at every object that it knows.
"""

import gc

import torch
from torch import nn

import fxpar

torch.set_num_threads(1)
fxpar.capture(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), (torch.ones(2, 2),)).partition("dp=2,tp=2")
gc.collect()
gc.freeze()
