"""A GradScaler leaves a step out on all ranks, or on none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fxpar
from fxpar.errors import MismatchError
from tests.processes import launch
from tests.run.test_pipeline import full, net, parallel, rows

pytestmark = pytest.mark.multiproc

OPTIMIZERS = {
    "unfused": lambda ps: torch.optim.AdamW(ps, 0.1),
    "fused": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, fused=True),
}


def trained(module: nn.Module, batch: dict[str, Any], kind: str) -> dict[str, Tensor]:
    """The parameters, and the scale, after steps of which the second finds one infinite gradient, which one rank has."""
    optimizer, scaler = OPTIMIZERS[kind](module.parameters()), torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(module(**batch)["loss"]).backward()
        for name, p in module.named_parameters():
            if step == 1 and name == "layers.0.weight":
                assert p.grad is not None
                mine = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                at = torch.distributed.get_rank() if isinstance(p.grad, DTensor) else 0
                if at == 0:
                    mine.view(-1)[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    return {n: full(p) for n, p in module.named_parameters()} | {"scale": torch.tensor(scaler.get_scale())}


def on_ranks(rank: int, plan: str, kind: str) -> None:
    (model, batch), (plain, _) = net(), net()
    module = parallel(model, plan, batch)
    have, want = trained(module, rows(batch, module), kind), trained(plain, batch, kind)
    assert want["scale"] == 16.0
    for name, value in have.items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plan, kind", [("pp=2,microbatches=2", "fused"), ("pp=2,microbatches=2", "unfused"),
                                        ("dp=2,zero=3", "fused"), ("tp=2", "unfused")])
def test_a_step_is_left_out_on_all_ranks(plan, kind):
    launch(2, on_ranks, plan, kind)


def alone(rank: int) -> str:
    model, batch = net()
    module: fxpar.ParallelModule = parallel(model, "dp=2", batch)
    optimizer, scaler = torch.optim.SGD(module.parameters(), 0.1), torch.amp.GradScaler("cpu")
    scaler.scale(module(**rows(batch, module))["loss"]).backward()
    try:
        if rank == 0:
            scaler.unscale_(optimizer)
        module(**rows(batch, module))
    except MismatchError as error:
        return str(error)
    return ""


def test_a_rank_that_searches_alone_is_named():
    assert all("GradScaler" in said for said in launch(2, alone))
