"""Activations exchanged by copies, on graphs made by hand and between processes."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor, fx, nn

import fxpar
from fxpar import compat
from fxpar.backends import buckets, overlap, prefetch, transfers
from fxpar.backends.copies import CopyGroup
from tests.graphs import Made
from tests.harness import RANDOM
from tests.processes import launch
from tests.slots import Alone
from tests.test_copies import use_files
from tests.test_prefetch import BYTES, keeps_values, some_step

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
COPIES = "activations"


@pytest.fixture
def copied(one_rank) -> Iterator[dict[str, str]]:
    group = CopyGroup(Alone())
    compat.register_group(group, COPIES)
    yield {one_rank: COPIES}


def over_copies(made: Made) -> list[str]:
    return [n.name for n in made.graph.nodes if n.op == "call_function" and n.args[-1:] == (COPIES,)]


def step(group: str, hidden: bool = False) -> Made:
    """A gathered gradient, a weight's gradient before it, and one that leads to it."""
    made = Made()
    x, w = made.input("x"), made.input("w")
    first = made.call("first", aten.mm.default, x, x)
    weight = made.call("weight", aten.mm.default, x, w)
    scaled = made.call("scaled", aten.mul.Tensor, weight, 2)
    grad = made.call("grad", aten.mm.default, first, w)
    start = made.call("start", c10d.all_gather_into_tensor.default, grad, 1, group)
    if hidden:
        first = made.call("beside", aten.mm.default, x, w)
    use = made.call("use", aten.mul.Tensor, made.call("wait", c10d.wait_tensor.default, start), 3)
    made.graph.output((use, scaled, first))
    return made


def test_what_no_product_hides_starts_before_one_that_does_not_lead_to_it(one_rank, copied):
    made = keeps_values(step(one_rank), lambda g: transfers.copy_activations(g, copied, BYTES))
    assert made.names() == ["first", "grad", "start", "weight", "scaled", "wait", "use"]
    made = step(one_rank, hidden=True)
    names = made.names()
    assert keeps_values(made, lambda g: transfers.copy_activations(g, copied, BYTES)).names() == names
    assert over_copies(made) == ["start"]


@pytest.mark.parametrize("least, kind, moved", [
    (BYTES, "sum", True), (BYTES + 1, "sum", False), (BYTES, "avg", False), (BYTES, "max", False)])
def test_small_ones_and_other_reductions_are_left_alone(one_rank, copied, least, kind, moved):
    made = Made()
    x = made.input("x")
    weight = made.call("weight", aten.mm.default, x, x)
    start = made.call("start", c10d.reduce_scatter_tensor.default, x, "sum", 1, one_rank)
    start.args = (x, kind, 1, one_rank)
    made.graph.output((made.call("wait", c10d.wait_tensor.default, start), weight))
    transfers.copy_activations(made.graph, {"another group": COPIES}, least)
    assert not over_copies(made)
    transfers.copy_activations(made.graph, copied, least)
    assert bool(over_copies(made)) == moved
    assert made.names() == (["start", "weight", "wait"] if moved else ["weight", "start", "wait"])


@pytest.mark.parametrize("leads", [True, False])
def test_what_is_waited_for_at_once_is_left_alone(one_rank, copied, leads):
    made = Made()
    x = made.input("x")
    value = made.call("product", aten.mm.default, x, x) if leads else x
    wait = made.scattered("it", value, one_rank)
    made.graph.output((made.call("later", aten.mm.default, wait, x),))
    names = made.names()
    transfers.copy_activations(made.graph, copied, BYTES)
    assert made.names() == names and not over_copies(made)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(RANDOM)
def test_any_step_keeps_its_values(one_rank, copied, r):
    made = some_step(r, one_rank, products=True)
    overlap.overlap_communication(made.graph)
    prefetch.prefetch_parameters(made.graph, 2 * BYTES, copied)
    buckets.bucket_reductions(made.graph, 2 * BYTES, copied)
    names, before = sorted(made.names()), over_copies(made)
    assert sorted(keeps_values(made, lambda g: transfers.copy_activations(g, copied, BYTES)).names()) == names
    order = list(made.graph.nodes)
    for start in (n for n in order if n.name in over_copies(made) and n.name not in before):
        assert start.target in (transfers.GATHER, transfers.SCATTER)
        assert any(n.target in transfers.PRODUCTS for n in order[order.index(start) : order.index(next(iter(start.users)))])


class Words(nn.Module):
    """Under zero=3 tokens go to the table, and what was looked up comes back: activations, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.out = nn.Embedding(64, 16), nn.LayerNorm(16), nn.Linear(16, 64)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.out(self.norm(self.table(ids)).relu())
        return F.cross_entropy(y.flatten(0, 1), ids.flatten())


def words(rank: int, folder: str, least: int, dtype: str) -> tuple[list[float], int]:
    """How far loss and gradients of two steps are from eager's, relatively; how many operators went over copies."""
    use_files(folder)
    real, seen = transfers.copy_activations, []

    def watched(graph: fx.Graph, bulk: dict[str, str]) -> None:
        before = {n for n in graph.nodes if n.args and n.args[-1] in bulk.values()}
        real(graph, bulk, least)
        seen.extend(n for n in graph.nodes if n.args and n.args[-1] in bulk.values() and n not in before)

    transfers.copy_activations = watched
    torch.manual_seed(0)
    model, ids = Words(), torch.randint(64, (4, 6))
    module = fxpar.parallelize(copy.deepcopy(model), f"dp=2,zero=3,param_dtype={dtype}", ids[:2], backend="inductor")
    model.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    far = []
    for _ in range(2):
        want, loss = model(ids), module(ids.chunk(2)[module.replica])
        want.backward()
        loss.backward()
        far.append(abs(loss.item() - want.item()) / want.item())
    for name, p in module.named_parameters():
        grad = dict(model.named_parameters())[name].grad.float()
        far.append(((p.grad.full_tensor() - grad).norm() / grad.norm()).item())
    return far, len(seen)


@pytest.mark.multiproc
@pytest.mark.parametrize("least, dtype, moved, close", [
    (64, "fp32", True, 1e-5), (2**20, "fp32", False, 1e-5), (64, "bf16", True, 3e-2)])
def test_lookups_by_copies_equal_one_process(least, dtype, moved, close):
    with tempfile.TemporaryDirectory() as folder:
        for far, count in launch(2, words, folder, least, dtype):
            assert max(far) < close and (count > 0) == moved
