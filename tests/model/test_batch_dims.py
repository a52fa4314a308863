"""Which dim of which input is the batch's, where it is not dim 0 of all that are as long as the first."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxpar import compiler
from fxpar.errors import CaptureError
from fxpar.model.inputs import example_call
from fxpar.plan import Plan


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.pos = nn.Linear(8, 16), nn.Linear(16, 4), nn.Parameter(torch.zeros(6, 1, 8))
        self.forward = functools.partial(forward, self)

    def logits(self, x):
        return self.b(torch.relu(self.a(x)))


def weighted(self, x, y, weight):
    return F.cross_entropy(self.logits(x), y, weight=weight)


def weights_first(self, weight, x, y):
    return F.cross_entropy(self.logits(x), y, weight=weight)


def positive(self, x, y, weight):
    return F.binary_cross_entropy_with_logits(self.logits(x), F.one_hot(y, 4).float(), pos_weight=weight)


def sequence_first(self, x, y):
    return F.cross_entropy(self.logits(x + self.pos).mean(0), y)


def labels_of_a_sequence(self, x, y):
    return F.cross_entropy(self.logits(x + self.pos).flatten(0, 1), y.flatten())


X, Y, W = torch.randn(4, 8), torch.randint(4, (4,)), torch.rand(4)
CASES = {
    weighted: ((X, Y, W), {"x": 0, "y": 0, "weight": None}),
    weights_first: ((W, X, Y), {"x": 0, "y": 0, "weight": None}),
    positive: ((X, Y, W), {"x": 0, "y": 0, "weight": None}),
    sequence_first: ((torch.randn(6, 4, 8), Y), {"x": 1, "y": 0}),
    labels_of_a_sequence: ((torch.randn(6, 4, 8), torch.randint(4, (6, 4))), {"x": 1, "y": 1}),
}


def program_of(model, args, **options):
    plan = Plan(dp=2, **options)
    return compiler.compile_replica(model, plan, torch.device("cpu"), None, example_call(model, args), None)


@pytest.mark.parametrize("forward", CASES, ids=lambda f: f.__name__)
def test_the_batch_is_found(forward):
    args, dims = CASES[forward]
    program = program_of(Net(forward), args)
    inputs = {s.name: s.value.shape for s in program.sources if s.kind == "input"}
    for (name, dim), given in zip(((n, dims[n]) for n in inputs), args, strict=True):
        assert list(inputs[name]) == [n * (2 if i == dim else 1) for i, n in enumerate(given.shape)]


def test_a_model_that_takes_no_longer_batch_says_what_was_taken_for_it():
    def fixed(self, x, y):
        return F.cross_entropy(self.logits(x.view(4, 8)), y)

    with pytest.raises(CaptureError, match=r"in these dims of the inputs: x: 0, y: 0; .*Plan\(batch_dims="):
        program_of(Net(fixed), (X, Y))


def test_what_the_plan_says_is_not_looked_for():
    with pytest.raises(CaptureError):
        program_of(Net(sequence_first), CASES[sequence_first][0], batch_dims={"x": 0, "y": 0})
