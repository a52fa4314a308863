"""Ranks of several kinds, which run other programs and hold other parameters, as pipeline ranks do."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

import fxpar
from fxpar.backends import eager
from fxpar.backends.transport.control import Control
from fxpar.errors import MismatchError
from fxpar.plan import Plan
from fxpar.run.agreement import agree_on_call, agree_on_program
from fxpar.run.engine import Engine
from fxpar.run.module import ParallelModule
from fxpar.run.store import ParameterStore
from fxpar.sharding.mesh import BoundMesh
from tests.processes import launch

BATCH = {"ids": torch.arange(4)}


class Halves(nn.Module):
    """Two parts, which share a table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(8, 4)
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(4))

    def forward(self, ids: Tensor, part: int) -> Tensor:
        if part == 0:
            return self.up(self.embed(ids)).square().sum()
        return self.head(self.down(torch.ones(4, 6)) * self.scale + ids[:, None]).square().sum()


def halves(plan: str) -> ParallelModule:
    """A module whose ranks are of two kinds: the first holds the parameters of one half, the second those of the other."""
    model, chosen = Halves(), Plan.parse(plan)
    programs = [fxpar.compile_program(model, chosen, {**BATCH, "part": part}) for part in (0, 1)]
    bound = BoundMesh(programs[0].mesh, "cpu", kinds=2)
    store = ParameterStore(model, bound, Control(kinds=2), torch.device("cpu"))
    store.adopt([[p] for p in programs])
    compile_call = functools.partial(fxpar.compile_program, model, chosen)
    return ParallelModule(store, Engine(store, chosen, compile_call, eager, "auto"))


def gradient(name: str, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))


def stepped(plan: str) -> tuple[ParallelModule, torch.optim.Optimizer, Tensor]:
    """One step of AdamW on given gradients, clipped to 1."""
    module = halves(plan)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for name, p in module.named_parameters():
        p.grad = module.parameter_store.wrap(fxpar.sharding.layout.take(
            gradient(name, p.shape), module.parameter_store.layouts[name], module.parameter_store.mesh,
            module.parameter_store.rank).contiguous(), p.shape, module.parameter_store.layouts[name])
    norm = module.clip_grad_norm_(1.0)
    optimizer.step()
    return module, optimizer, norm


def plain_step() -> tuple[Halves, torch.optim.Optimizer, Tensor]:
    model = Halves()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for name, p in model.named_parameters():
        p.grad = gradient(name, p.shape)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return model, optimizer, norm


def saved_and_loaded(rank: int, plan: str, folder: str) -> dict[str, Any]:
    module, optimizer, norm = stepped(plan)
    fxpar.save_checkpoint(Path(folder) / "saved", module, optimizer)
    fxpar.export_safetensors(Path(folder) / "exported", module)
    again, other = halves(plan), None
    other = torch.optim.AdamW(again.parameters(), lr=0.1)
    fxpar.load_checkpoint(Path(folder) / "saved", again, other)
    equal = all(torch.equal(p.to_local(), q.to_local()) for p, q in zip(module.parameters(), again.parameters(), strict=True))
    moments = all(torch.equal(optimizer.state[p]["exp_avg"].to_local(), other.state[q]["exp_avg"].to_local())
                  for p, q in zip(module.parameters(), again.parameters(), strict=True))
    fxpar.load_safetensors(Path(folder) / "exported", again)
    return {"norm": norm.item(), "names": [n for n, _ in module.named_parameters()], "equal": equal, "moments": moments,
            "state": sorted(module.state_dict()), "bytes": sum(p.to_local().nbytes for p in module.parameters())}


@pytest.mark.multiproc
@pytest.mark.parametrize("plan, world", [("dp=1", 2), ("dp=2,zero=3", 4)])
def test_each_kind_holds_its_parameters_and_all_make_one_checkpoint(plan, world, tmp_path):
    found = launch(world, saved_and_loaded, plan, str(tmp_path))
    model, optimizer, norm = plain_step()
    first, second = ["embed.weight", "up.weight", "up.bias"], ["embed.weight", "down.weight", "down.bias"]
    for rank, one in enumerate(found):
        assert one["names"] == (first if rank < world // 2 else second)
        assert one["norm"] == pytest.approx(norm.item(), rel=1e-6) and one["equal"] and one["moments"]
        assert "scale" in one["state"] and ("down.bias" in one["state"]) == (rank >= world // 2)
    loaded, other = Halves(), None
    other = torch.optim.AdamW(loaded.parameters(), lr=0.1)
    fxpar.load_checkpoint(tmp_path / "saved", loaded, other)
    exported = {n: t for file in (tmp_path / "exported").glob("*.safetensors") for n, t in load_file(file).items()}
    assert exported.keys() == {"embed.weight", "up.weight", "up.bias", "down.weight", "down.bias", "scale"}
    for name, p in model.named_parameters():
        q = dict(loaded.named_parameters())[name]
        torch.testing.assert_close(q, p)
        torch.testing.assert_close(exported[name], p.detach())
        torch.testing.assert_close(other.state[q]["exp_avg"], optimizer.state[p]["exp_avg"])


def from_one(rank: int, folder: str) -> list[str]:
    module = halves("dp=1")
    fxpar.load_checkpoint(folder, module, torch.optim.AdamW(module.parameters(), lr=0.1))
    plain = dict(plain_step()[0].named_parameters())
    return [n for n, p in module.named_parameters() if not torch.allclose(p.full_tensor(), plain[n])]


@pytest.mark.multiproc
def test_what_one_process_saved_loads_into_ranks_of_several_kinds(tmp_path):
    model, optimizer, _ = plain_step()
    fxpar.save_checkpoint(tmp_path / "saved", model, optimizer)
    assert launch(2, from_one, str(tmp_path / "saved")) == [[], []]


def own_optimizer(rank: int) -> list[int]:
    model = Halves()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    programs = [fxpar.compile_program(model, Plan(), {**BATCH, "part": part}) for part in (0, 1)]
    store = ParameterStore(model, BoundMesh(programs[0].mesh, "cpu", kinds=2), Control(kinds=2), torch.device("cpu"))
    store.adopt([[p] for p in programs])
    mine = {id(p) for p in model.parameters()}
    return [sum(id(p) in mine for p in group["params"]) - len(group["params"]) + len(mine) for group in optimizer.param_groups]


@pytest.mark.multiproc
def test_an_optimizer_made_before_keeps_the_parameters_of_its_rank():
    assert launch(2, own_optimizer) == [[3], [3]]


def differing(rank: int) -> list[str]:
    said = []
    control = Control(kinds=2)
    key = ("inputs", (True,), (rank // 2,), 0, 0, 0, None, None, True, (), False, (0, 0), [], [], 0, (True,), [], [])
    agree_on_call(control, "forward", key, lambda part: ["p"])()
    for part, value in ((2, (rank == 3,)), (0, "other" if rank == 2 else "inputs")):
        try:
            agree_on_call(control, "forward", (*key[:part], value, *key[part + 1 :]), lambda part: ["p"])()
        except MismatchError as error:
            said.append(str(error).split(":")[1].split(";")[0])
    model = Halves()
    for mine, theirs in ((rank // 2, rank // 2), (rank // 2, 1 - rank // 2 if rank == 1 else rank // 2)):
        try:
            with agree_on_program(control) as made:
                made.append(fxpar.compile_program(model, Plan(), {**BATCH, "part": theirs}))
        except MismatchError as error:
            said.append(f"{mine} {str(error).split(':')[0]}")
    dist.barrier()
    return said


@pytest.mark.multiproc
def test_ranks_of_a_kind_agree_and_those_of_others_need_not():
    for rank, said in enumerate(launch(4, differing)):
        assert said == [" rank 2 with False, rank 3 with True", " rank 0 with 'inputs', rank 2 with 'other'",
                        f"{rank // 2} ranks captured different programs (rank 0 and rank 1 differ"]
