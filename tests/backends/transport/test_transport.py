"""Who moves parameters and gradients: as the user chose, in a real run and in simulation."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

import fxpar
from fxpar.backends.inductor import buckets
from fxpar.backends.transport import base as transport
from fxpar.backends.transport.base import NCCL, TRANSPORTS, Transport, copied_axes
from fxpar.sharding.mesh import from_plan
from tests.backends.transport.test_copies import Net, use_files
from tests.processes import launch


def net() -> tuple[Net, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Net(), {"x": torch.randn(4, 8), "target": torch.randint(9, (4,))}


def test_a_transport_names_the_group_that_moves_parameters():
    copying = Transport({"dp": "copies of dp"})
    assert copying.copies("dp") and copying.group("dp") == "copies of dp"
    assert not copying.copies("tp") and copying.group("tp") == "tp"
    assert not NCCL.copies("dp") and NCCL.group("dp") == "dp"


def test_backends_hand_no_mapping_of_bulk_transfers_around():
    files = list(Path(transport.__file__).parent.parent.rglob("*.py"))
    assert len(files) > 10 and not [f.name for f in files if "bulk" in f.read_text().lower()]


@pytest.mark.parametrize("plan, axes", [
    ("dp=2,zero=3", ("dp",)), ("dp=2,tp=2,zero=1", ("dp",)), ("dp=4,dp_replicate=2,zero=2", ("dp_shard",)), ("dp=2", ()),
    ("tp=2", ()), ("dp=2,zero=3,overlap_param_gather=false", ()), ("dp=2,zero=3,overlap_grad_reduce=false", ())])
def test_copy_engines_are_for_parameters_stored_in_parts_and_communicated_in_buckets(plan, axes):
    parsed = fxpar.Plan.parse(plan)
    assert copied_axes("auto", parsed, from_plan(parsed)) == axes
    assert copied_axes("nccl", parsed, from_plan(parsed)) == ()


def steps(rank: int, folder: str) -> list[tuple[int, float]]:
    """With each transport, where both can be had: how many groups that copy there are now; how far gradients are from eager's."""
    asked, found = use_files(folder), []
    model, batch = net()
    model(**batch).backward()
    want = [p.grad.clone() for p in model.parameters()]
    for chosen in reversed(TRANSPORTS):
        model, _ = net()
        mine = {k: v.chunk(2)[rank] for k, v in batch.items()}
        module = fxpar.parallelize(model, "dp=2,zero=3", mine, backend="inductor", transport=chosen)
        module(**mine).backward()
        far = max((p.grad.full_tensor() - grad).norm().item() for p, grad in zip(module.parameters(), want, strict=True))
        found.append((len(asked), far))
    return found


@pytest.mark.multiproc
def test_with_nccl_nothing_is_made_that_copies():
    with tempfile.TemporaryDirectory() as folder:
        for (nccl, far), (auto, as_far) in launch(2, steps, folder, timeout=300):
            assert nccl == 0 and auto == 1
            assert far < 1e-6 and as_far < 1e-6


@pytest.mark.parametrize("chosen, copied", [("auto", {"all_gather_into_tensor_coalesced", "reduce_scatter_tensor_coalesced"}),
                                               ("nccl", set())])
def test_a_simulation_has_the_graphs_of_its_transport(chosen, copied, monkeypatch):
    seen, last = set(), buckets.bucket_reductions

    def noted(graph: fx.Graph, **options: object) -> None:
        last(graph, **options)
        seen.update(n.target.overloadpacket.__name__ for n in graph.nodes if str(n.args[-1:]).endswith("-copies',)"))

    monkeypatch.setattr(buckets, "bucket_reductions", noted)
    model, batch = net()
    fxpar.simulate(model, "dp=2,zero=3", batch, lowered=True, transport=chosen).step(**batch)
    assert seen >= copied and bool(seen) == bool(copied)
