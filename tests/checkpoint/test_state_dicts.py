"""The functions of `torch.distributed.checkpoint.state_dict` on a parallel module and its optimizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as functions
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

import fxpar
from tests.processes import launch

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


class Scored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).square().mean()


def stepped(module: Any, x: torch.Tensor, opt: torch.optim.Optimizer) -> float:
    loss = module(x)
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.item()


def whole(tree: Any) -> Any:
    return pytree.tree_map_only(DTensor, DTensor.full_tensor, tree)


def on_ranks(rank: int, plan: str) -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    plain = Scored()
    module: Any = fxpar.parallelize(copy.deepcopy(plain), plan, (x[:2],) if "dp=2" in plan else (x,))
    mine = x.chunk(module.replica.count)[module.replica]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (plain, module)]
    for _ in range(2):
        torch.testing.assert_close(stepped(module, mine, optimizers[1]), stepped(plain, x, optimizers[0]))
    want, want_opt = functions.get_state_dict(plain, optimizers[0])
    parts = functions.get_state_dict(module, optimizers[1])
    torch.testing.assert_close(whole(parts[0]), want)
    torch.testing.assert_close(whole(parts[1])["state"], want_opt["state"])
    for made, expected in ((functions.get_model_state_dict(module, options=WHOLE), want),
                           (functions.get_optimizer_state_dict(module, optimizers[1], options=WHOLE).get("state"),
                            want_opt["state"])):
        if rank == 0:
            torch.testing.assert_close(made, expected)

    kept = copy.deepcopy(parts)
    after = [stepped(module, mine, optimizers[1]) for _ in range(2)]
    functions.set_state_dict(module, optimizers[1], model_state_dict=kept[0], optim_state_dict=kept[1])
    assert [stepped(module, mine, optimizers[1]) for _ in range(2)] == after
    functions.set_model_state_dict(module, want, options=StateDictOptions(full_state_dict=True))
    functions.set_optimizer_state_dict(module, optimizers[1], want_opt, options=StateDictOptions(full_state_dict=True))
    torch.testing.assert_close([stepped(module, mine, optimizers[1]) for _ in range(2)], after)


@pytest.mark.multiproc
@pytest.mark.parametrize("plan", ["dp=2,zero=3", "tp=2"])
def test_states_go_out_and_come_back(plan):
    launch(2, on_ranks, plan)
