"""What ranks were given and what they hold: compared by value, without waiting for a GPU; and who is to be given what."""

from __future__ import annotations

import logging
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fxpar
from fxpar import MismatchError
from fxpar.backends.transport.control import Check, Control
from fxpar.run.arriving import Arriving, checksum, joined, norm_of, norms, weighted_sums
from fxpar.run.batches import BatchChecks
from fxpar.run.compared import CHECKED_EVERY, FIRST
from fxpar.run.module import Replica
from fxpar.sharding.mesh import from_plan
from tests.processes import launch

X = torch.arange(24).view(4, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square().mean()


# ---- numbers ----


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.bfloat16, torch.float64])
def test_a_checksum_follows_from_values_and_their_order(dtype):
    x = torch.tensor([[0, 1, 1], [1, 0, 0]]).to(dtype)
    assert int(checksum(x)) == int(checksum(x.clone())) == int(checksum(x.t().contiguous().t()))
    other = x.clone()
    other[0, 0] = 1
    assert len({int(checksum(t)) for t in (x, other, x.flip(0), x.flip(1))}) == 4


def test_norms_are_equal_for_equal_tensors_alone():
    tensors = [torch.tensor([3.0, 4.0]), torch.ones(2).bfloat16()]
    numbers = [int(n) for n in norms(tensors)]
    assert norm_of(numbers[0]) == 5 and norm_of(numbers[1]) == pytest.approx(2**0.5)
    others = [torch.tensor([1, 2]), torch.tensor([True, True]), torch.ones(0), torch.ones(2, dtype=torch.cfloat),
              torch.ones(2).to(torch.float8_e4m3fn)]
    assert all(int(n) == int(checksum(t)) for n, t in zip(norms(others), others, strict=True))
    assert int(norms([torch.tensor([3.0, 4.0001])])[0]) != numbers[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weighted_sums_tell_copies_of_one_norm_apart(dtype):
    x = torch.randn(3, 5000).to(dtype)
    alike = [x, x.clone(), x.t().contiguous().t()]
    others = [-x, x.flip(0), x.flip(1), x.roll(4096), torch.cat([-x[:1], x[1:]])]
    assert len({int(n) for n in weighted_sums(alike)}) == 1 and len({int(n) for n in weighted_sums([x, *others])}) == 6
    assert [int(n) for n in weighted_sums([torch.ones(0), torch.tensor([1, 2])])] == [0, 0]


def test_numbers_that_a_gpu_has_not_come_to_are_not_here():
    made = Arriving([torch.tensor(5), torch.tensor(7)])
    assert made.here() == [5, 7] and joined([5, 7]) != joined([7, 5])
    made._event = SimpleNamespace(query=lambda: False, synchronize=lambda: None)
    assert made.here() is None and made.waited() == [5, 7]


@pytest.mark.gpu
def test_numbers_come_from_a_gpu_without_waiting_for_it():
    x = X.cuda()
    weights = [torch.randn(64, 64, device="cuda"), torch.randn(8, device="cuda", dtype=torch.bfloat16)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = Arriving([checksum(x), *norms(weights), *weighted_sums(weights)])
        made.here()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert made.here() == [int(checksum(X)), *(int(n) for n in (*norms(weights), *weighted_sums(weights)))]


# ---- batches ----


def unknown(named: dict[str, Any]) -> dict[str, int | None]:
    """Batch dims, where no program takes such inputs yet."""
    return {}


def checks(every: int, theirs: Any = None) -> BatchChecks:
    """Of rank 0 of two, which share a replica unless there are two."""
    mesh = from_plan(fxpar.Plan(tp=2))
    control: Any = SimpleNamespace(world=2, rank=0, exchange=lambda mine: [mine, (0, theirs)])
    bound: Any = SimpleNamespace(mesh=mesh, index=lambda axes: 0)
    return BatchChecks(bound, control, every)


@pytest.mark.parametrize("every, wanted", [
    (CHECKED_EVERY, [*range(1, FIRST + 1), CHECKED_EVERY, 2 * CHECKED_EVERY]), (0, []), (1, list(range(1, 201)))])
def test_which_calls_are_compared(every, wanted):
    made, found = checks(every), []
    for call in range(1, 201):
        due = made.due({"x": X, "scale": 2.0}, unknown)
        if due:
            found.append(call)
            made.judge([[due[0].number]])
    assert found == wanted


def test_a_batch_that_is_not_here_yet_is_compared_later():
    made = checks(CHECKED_EVERY)
    (first,) = made.due({"x": X}, unknown)
    made.judge([None])
    assert made.due({"x": X + 1}, unknown) == [first]


def test_an_input_that_differs_within_a_replica_is_named():
    made = checks(1, {"x": [1], "labels": [2]})
    made.due({"x": X, "labels": X}, unknown)
    made.sums._known = {0: 1, 1: 3}
    with pytest.raises(MismatchError, match=r"input 'labels': ranks 0 and 1 belong to replica 0 of 1.*fxpar\.sampler"):
        made.judge([[None]])


def test_inputs_without_a_batch_are_compared_among_all_replicas():
    made = checks(1, {"x": [5], "weights": [7], "t": [2]})
    made.slots, made.slot = 2, 1
    rows, common = made.due({"x": X, "weights": X[0], "t": torch.tensor(1.0)}, lambda named: {"x": 0, "weights": None, "t": None})
    assert (rows.slot, rows.slots, common.slot, common.slots) == (1, 2, 0, 1)
    made.sums._known = {0: 1, 1: 6, 2: 2}
    with pytest.raises(MismatchError, match=r"input 'weights': ranks 0 and 1 have others, and it has no batch dim.*batch_dims"):
        made.judge([[1, 5], [None]])


def test_inputs_that_were_computed_may_differ_by_rounding():
    leaf = torch.randn(8, 6, requires_grad=True)
    for change, differs in ((1.0, False), (1.001, False), (1.1, True), (-1.0, True)):
        computed = (leaf * 1.0).detach() * change
        numbers = [int(n) for n in (*norms([computed]), *weighted_sums([computed]))]
        made = checks(1, {"z": numbers})
        made.due({"z": leaf * 1.0}, unknown)
        if differs:
            with pytest.raises(MismatchError, match="different values of input 'z'"):
                made.judge([[None]])
        else:
            made.judge([[None]])


def test_an_input_that_wants_a_gradient_and_was_not_computed_is_compared_to_the_bit():
    made, leaf = checks(1), torch.randn(8, 6, requires_grad=True)
    assert made.due({"z": leaf}, unknown) == checks(1).due({"z": leaf.detach()}, unknown)


def test_replicas_with_the_same_batch_are_told_of(caplog):
    made = checks(CHECKED_EVERY)
    made.slots, made._same = 2, True
    with caplog.at_level(logging.WARNING, "fxpar"):
        for _ in range(FIRST):
            assert not caplog.records
            number = made.due({"x": X}, unknown)[0].number
            made.judge([[number, number]])
    assert "all 2 replicas were given the same batch" in caplog.text


# ---- the part of a rank ----


def test_the_number_of_a_replica_knows_how_many_there_are():
    replica = pickle.loads(pickle.dumps(Replica(1, 4)))
    assert replica == 1 and X[replica].equal(X[1]) and (replica.index, replica.count) == (1, 4)


def test_a_sampler_takes_a_parallel_module():
    with pytest.raises(TypeError, match=r"what fxpar\.parallelize returned, not Net"):
        fxpar.sampler(X, Net())


def values(rank: int) -> dict[str, Any]:
    """What two ranks find, one thing after the other."""
    control, out = Control(), {}
    late = Check(0, 1, 4 if rank else None)
    out["parts"] = control.compare_parts(7, [Check(rank, 2, rank + 5), Check(0, 1, 3), Check(0, 1, rank), late])
    torch.manual_seed(0)
    for plan in ("tp=2", "dp=2"):
        module = fxpar.parallelize(Net(), plan, (torch.ones(4, 6),))
        rows = torch.arange(48.0).view(8, 6)
        loader = DataLoader(rows, batch_size=2, sampler=fxpar.sampler(rows, module, shuffle=False))
        out[plan] = [batch[:, 0].int().tolist() for batch in loader]
        for batch in loader:
            module(batch)
    weight, said = module.get_parameter("linear.weight").to_local(), []
    for write in (lambda t: t.mul_(1 + 1e-6), lambda t: t.copy_(t.flip(0)), lambda t: t.neg_(), lambda t: t.mul_(2)):
        with torch.no_grad():
            write(weight) if rank else None
        try:
            module.require_alike()
        except MismatchError as error:
            said.append(str(error))
    return {**out, "said": said}


@pytest.mark.multiproc
def test_what_two_ranks_are_given_and_hold():
    first, second = launch(2, values, timeout=60)
    assert first["parts"] == second["parts"] == ((7,), [[5, 6], [3], [None], None])
    assert first["tp=2"] == second["tp=2"] == [[0, 6], [12, 18], [24, 30], [36, 42]]
    assert first["dp=2"] == [[0, 12], [24, 36]] and second["dp=2"] == [[6, 18], [30, 42]]
    assert first["said"] == second["said"] and len(first["said"]) == 3
    assert all("'linear.weight' on ranks 0 and 1" in said for said in first["said"])
