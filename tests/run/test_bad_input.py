"""Mistakes: each is refused with an error that names it and says what would work, on every rank alike."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpar
from fxpar import CaptureError, FxparError, InputError, MismatchError, Plan, PlanError, UnsupportedOperator
from fxpar.testing import assert_equivalent
from tests import zoo
from tests.processes import launch


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.linear, self.sign = nn.Linear(6, width), 1

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        y = self.linear(x) * self.sign
        return y if target is None else F.mse_loss(y, target)


class Random(Net):
    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) + torch.poisson(x.abs())).sum()  # random


class Branch(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if y.sum() > 0:  # branch
            y = -y
        return y.sum()


class BranchesWhereNegative(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return -y.sum() if self.sign < 0 and y.sum() > 0 else y.sum()


class Selects(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y[y > 0].sum()  # selects


class SelectsAndWrites(Net):
    """What is written to has the trace made functional, which cannot be done with shapes that depend on values."""

    def forward(self, x: Tensor) -> Tensor:
        y, chosen = self.linear(x).add_(1), x[:, 0] > 0
        kept = y[chosen]  # keeps
        return F.cross_entropy(kept, torch.zeros(4).long()[chosen])


class Writes(Net):
    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)  # input
        return self.linear(x).sum()


class Clips(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.linear.weight.data.clamp_(-1, 1)  # clips
        return self.linear(x).sum()


class Replaces(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.linear.weight.data = self.linear.weight.data * 2  # replaces
        return self.linear(x).sum()


class Renormalises(Net):
    def forward(self, x: Tensor) -> Tensor:
        table = nn.functional.embedding(x.argmax(-1), self.linear.weight, max_norm=1.0)  # renormalises
        return self.linear(table).sum()


class Draws(Net):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.draw()).sum()


class Reads(Net):
    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.linear.weight.data.norm()).sum()


X = torch.ones(4, 6)


def line_of(mark: str) -> str:
    """``file:line`` of the line of this file that ends in a comment."""
    for number, line in enumerate(open(__file__), 1):
        if line.endswith(f"# {mark}\n"):
            return f"{__file__}:{number}"
    raise LookupError(mark)


# ---- plans ----


@pytest.mark.parametrize("plan, field, suggestion", [
    ("dp=2", "dp", "dp=1"),
    ("dp=2,tp=2", "dp", "launching 4 ranks"),
    ("dp=1,banana=2", "banana", "dp=1"),
    ("dp=nan", "dp", "dp=1"),
    ({"dp": 1}, "plan", "fxpar.Plan()"),
])  # fmt: skip
def test_plans_that_do_not_fit_one_rank(plan, field, suggestion):
    with pytest.raises(PlanError) as caught:
        fxpar.parallelize(Net(), plan, (X,))
    assert caught.value.field == field and caught.value.suggestion == suggestion


@pytest.mark.parametrize("degree", [float("nan"), float("inf"), 1.5, 0, -2, True, "2"])
def test_degrees_that_are_no_positive_integer(degree):
    with pytest.raises(PlanError, match="must be a positive integer; try tp=1"):
        Plan(tp=degree)


def test_unknown_backend():
    with pytest.raises(PlanError, match="one of auto, inductor, eager; try auto"):
        fxpar.parallelize(Net(), "dp=1", (X,), backend="xla")


@pytest.mark.parametrize("transport", ["gloo", "NCCL", None])
def test_unknown_transport(transport):
    with pytest.raises(PlanError, match=f"`transport`={transport!r}: must be one of auto, nccl; try auto"):
        fxpar.parallelize(Net(), "dp=1", (X,), transport=transport)


@pytest.mark.parametrize("run", [fxpar.inspect, fxpar.simulate, fxpar.testing.assert_equivalent])
def test_a_global_batch_that_dp_does_not_divide(run):
    with pytest.raises(PlanError, match=r"`dp`=3: must divide the global batch of 4 \(input 'x'\)"):
        run(Net(), "dp=3", (X,))


def test_a_batch_that_the_microbatches_do_not_divide():
    module = fxpar.parallelize(Net(), "microbatches=3", (X, X))
    with pytest.raises(InputError, match=r"`microbatches`=3: must divide the replica's batch of 4.*try a batch of 6"):
        module.train_step(X, X)


def test_more_tensor_ranks_than_heads_are_no_mistake():
    model, batch = zoo.build("llama")  # 4 heads, 2 of keys and values
    fxpar.testing.assert_equivalent(model, "tp=8", batch)


# ---- models ----


@pytest.mark.parametrize("wrap, named", [
    (lambda model: fxpar.parallelize(model, "dp=1", (X,)), "ParallelModule"),
    (lambda model: fxpar.parallelize(model, "dp=1", (X,)).linear, "DTensor parameters"),
    (lambda model: nn.Sequential(nn.DataParallel(model)), "DataParallel"),
], ids=["module", "part of one", "wrapped inside"])  # fmt: skip
def test_models_that_are_parallel_already(wrap, named):
    model = wrap(Net())
    with pytest.raises(PlanError, match=f"{named}.*try the plain model"):
        fxpar.parallelize(model, "dp=1", (X,))


@pytest.mark.parametrize("thing", [lambda x: x, "gpt2", Net], ids=["function", "name", "class"])
def test_what_is_no_module(thing):
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, not"):
        fxpar.parallelize(thing, "dp=1", (X,))


def test_a_random_operator_is_named_with_its_line_and_a_way_out():
    with pytest.raises(UnsupportedOperator) as caught:
        fxpar.simulate(Random(), "dp=2", (X,))
    assert caught.value.op == "aten.poisson.default"
    assert caught.value.where.startswith(line_of("random"))
    assert "torch.rand" in str(caught.value)


@pytest.mark.parametrize("model, mark, what, way_out", [
    (Branch, "branch", "control flow", "torch.where"),
    (Selects, "selects", "shape depends on values", "torch.where"),
    (Renormalises, "renormalises", "writes to the parameter linear.weight", "max_norm out, and scale them between steps"),
    (SelectsAndWrites, "keeps", "shape depends on values", "torch.where"),
])  # fmt: skip
def test_what_depends_on_values_is_named_with_its_line(model, mark, what, way_out):
    with pytest.raises(CaptureError) as caught:
        fxpar.simulate(model(), "dp=2", (X,))
    assert caught.value.where.startswith(line_of(mark))
    assert what in caught.value.what and way_out in caught.value.way_out


@pytest.mark.parametrize("model, mark, what", [
    (Writes, "input", "writes to the input x"),
    (Clips, "clips", "writes to the parameter linear.weight"),
    (Replaces, "replaces", "replaces the .data of a tensor"),
])  # fmt: skip
def test_a_forward_that_writes_to_what_is_no_buffer(model, mark, what):
    with pytest.raises(CaptureError, match=what) as caught:
        fxpar.simulate(model(), "dp=2", (X,))
    assert caught.value.where.startswith(line_of(mark))
    assert "write to buffers alone" in caught.value.way_out


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
def test_random_numbers_that_a_trace_would_freeze(draw):
    with pytest.raises(CaptureError, match=r"Python's random or numpy.*every step would use the same; make them outside"):
        fxpar.simulate(Draws(draw), "dp=2", (X,))


def test_a_parameter_that_is_read_without_its_gradient():
    assert_equivalent(Reads(), "dp=2", (X,))


class Neighbours(Net):
    """A graph's neighbours, kept sparse: as a buffer, or as a parameter."""

    def __init__(self, kept: Tensor | nn.Parameter):
        super().__init__()
        if isinstance(kept, nn.Parameter):
            self.kept = kept
        else:
            self.register_buffer("kept", kept)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.kept @ x).sum()


@pytest.mark.parametrize("enter", [lambda m: fxpar.parallelize(m, "dp=1", (X,)), lambda m: fxpar.capture(m, (X,)),
                                   lambda m: fxpar.inspect(m, "dp=2", (X,))])
def test_a_model_that_holds_a_sparse_tensor(enter):
    sparse = torch.eye(4).to_sparse()
    for kind, kept in (("buffer", sparse), ("buffer", torch.eye(4).to_sparse_csr()), ("parameter", nn.Parameter(sparse))):
        with pytest.raises(CaptureError, match=rf"{kind} 'kept' of the layout torch\.sparse_.*keep it dense"):
            enter(Neighbours(kept))


def test_a_lazy_model_that_was_not_called():
    lazy = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(CaptureError, match=r"parameter '0.weight' of a lazy module.*call the model once"):
        fxpar.parallelize(lazy, "dp=1", (X,))
    lazy(X)
    fxpar.parallelize(lazy, "dp=1", (X,))(X)


def test_a_buffer_that_is_exchanged_for_a_sparse_one():
    module = fxpar.parallelize(Neighbours(torch.eye(4)), "dp=1", (X,))
    module(X)
    module.kept = torch.eye(4).to_sparse()
    with pytest.raises(CaptureError, match=r"buffer 'kept' of the layout torch\.sparse_coo"):
        module(X)


# ---- inputs ----


def test_a_model_that_does_not_say_what_it_takes():
    with pytest.raises(InputError, match="Net does not say what it takes: pass example_inputs"):
        fxpar.parallelize(Net(), "dp=1")


@pytest.mark.parametrize("args, kwargs, named", [
    ((X,), {"labels": X}, "unexpected keyword argument 'labels'"),
    ((), {"target": X}, "missing a required argument: 'x'"),
    ((X, X, X), {}, "too many positional arguments"),
    ((X,), {"x": X}, "multiple values for argument 'x'"),
])  # fmt: skip
def test_arguments_that_forward_does_not_take(args, kwargs, named):
    module = fxpar.parallelize(Net(), "dp=1", (X,))
    with pytest.raises(InputError, match=re.escape("Net.forward(x: ") + f".*{named}"):
        module(*args, **kwargs)


def test_a_training_step_without_a_loss():
    module = fxpar.parallelize(Net(), "dp=1", (X,))
    with pytest.raises(InputError, match="train_step needs a loss"):
        module.train_step(X)


# ---- ranks that disagree: an error on all of them ----


OPTIONS = ("backend", "transport")


def error_of(rank: int, what: str) -> tuple[str, str]:
    """The error that this rank gets where ranks differ in `what`."""
    torch.manual_seed(0)
    try:
        model = BranchesWhereNegative() if what == "failure" else Net(5 + rank if what == "model" else 6)
        model.sign = 1 - 2 * rank if what in ("code", "failure") else 1
        plan = ["dp=2", "tp=2"][rank] if what == "plan" else "dp=2"
        options = {what: (["eager", "inductor"] if what == "backend" else ["auto", "nccl"])[rank]} if what in OPTIONS else {}
        module = fxpar.parallelize(model, plan, (X[: 1 + rank] if what == "example" else X,), **options)
        module.train(what != "mode" or rank == 0)
        module(X[: 1 + rank] if what == "shape" else X)
    except FxparError as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.multiproc
@pytest.mark.parametrize("what, named", [
    ("shape", r"rank 0 with .*\(1, 6\).*, rank 1 with .*\(2, 6\)"),
    ("mode", r"the mode \(training\) of submodule \(the model itself\): rank 0 with True, rank 1 with False"),
    ("model", r"in parameter 'linear.weight': rank 0 with 'float32\[5, 6\]', rank 1 with 'float32\[6, 6\]'"),
    ("code", "ranks captured different programs .*the model's code, configuration, plan"),
    ("plan", r"in plan: rank 0 with .*dp=2.*, rank 1 with .*tp=2"),
    ("example", r"in example input 'x': rank 0 with 'float32\[1, 6\]', rank 1 with 'float32\[2, 6\]'"),
    ("backend", "in backend: rank 0 with 'eager', rank 1 with 'inductor': every rank must be given the same"),
    ("transport", "in transport: rank 0 with 'auto', rank 1 with 'nccl'"),
])  # fmt: skip
def test_ranks_that_differ_all_raise(what, named):
    for kind, text in launch(2, error_of, what, timeout=40):
        assert kind == MismatchError.__name__ and re.search(named, text)


@pytest.mark.multiproc
def test_a_model_that_fails_on_one_rank_fails_on_all():
    first, second = launch(2, error_of, "failure", timeout=40)
    assert first[0] == "FxparError" and "rank 1 could not compile the model: CaptureError" in first[1]
    assert second[0] == "CaptureError"


def weights(rank: int) -> dict[str, Tensor]:
    torch.manual_seed(rank)
    model = nn.BatchNorm1d(6)
    nn.init.normal_(model.weight)
    model.running_mean.fill_(rank)
    model.register_buffer("switch", torch.tensor(rank == 0))
    module = fxpar.parallelize(model, "dp=2", (X,))
    return {n: t.full_tensor() if n in ("weight", "bias") else t for n, t in module.state_dict().items()}


@pytest.mark.multiproc
def test_models_of_different_seeds_start_with_the_weights_of_rank_0():
    first, second = launch(2, weights)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert first["running_mean"].eq(0).all() and first["switch"]
