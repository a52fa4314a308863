"""Pipeline stages on real ranks, against the plain model in one process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import fxpar
from fxpar.errors import FxparError, InputError
from fxpar.run.stage import StageOfRank
from tests.processes import launch

pytestmark = pytest.mark.multiproc
CONNECTED = "pp=2,dp=2,microbatches=2"


class Net(nn.Module):
    """A table that the head shares, four layers, and dropout; with `balance` a loss that is a mean of microbatches'."""

    def __init__(self, dropout: float = 0.0, balance: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.BatchNorm1d(8, affine=False) if norm else None
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.dropout, self.balance = dropout, balance

    def forward(self, ids: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(ids)
        for i, layer in enumerate(self.layers):
            x = x + F.dropout(F.gelu(layer(x)), self.dropout, self.training)
            if self.norm is not None and i == 1:
                x = self.norm(x)
        logits = self.head(x)
        if target is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits, target, ignore_index=-1)
        if self.balance:
            loss = loss + logits.softmax(-1).mean(0).square().sum()
        return {"loss": loss, "logits": logits}


def net(**options: Any) -> tuple[Net, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Net(**options)
    target = torch.randint(12, (16,))
    target[1:6] = -1
    return model, {"ids": torch.randint(12, (16,)), "target": target}


def rows(batch: dict[str, Tensor], module: Any) -> dict[str, Tensor]:
    return {k: v.chunk(module.plan.dp)[module.replica] for k, v in batch.items()}


def parallel(model: nn.Module, plan: str, batch: dict[str, Tensor], backend: str = "eager") -> fxpar.ParallelModule:
    dp = fxpar.Plan.parse(plan).dp
    return fxpar.parallelize(model, plan, {k: v.chunk(dp)[0] for k, v in batch.items()}, backend=backend)


def full(t: Any) -> Tensor:
    return getattr(t, "full_tensor", lambda: t)().detach().clone()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {n: full(t) for n, t in module.state_dict().items()}


def close(have: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """What a rank has is as it should be."""
    assert have
    for name, value in have.items():
        torch.testing.assert_close(value, want[name], rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def steps(module: Any, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> list[tuple[float, float]]:
    """Three steps; the second by `train_step` where there is one."""
    found = []
    for step in range(3):
        if step == 1 and isinstance(module, fxpar.ParallelModule):
            loss = module.train_step(**batch)
        else:
            loss = module(**batch)["loss"]
            loss.backward()
        parameters = list(module.parameters())
        parallel = isinstance(module, fxpar.ParallelModule)
        norm = module.clip_grad_norm_(0.5) if parallel else nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), float(norm)))
    return found


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: full(p.grad) for n, p in module.named_parameters() if p.grad is not None}


def trained(rank: int, plan: str, folder: str, backend: str = "eager") -> dict[str, Any]:
    model, batch = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    module = parallel(model, plan, batch, backend)
    mine = rows(batch, module)
    out: dict[str, Any] = {"steps": steps(module, mine, optimizer), "state": state(module)}
    fxpar.save_checkpoint(Path(folder) / "saved", module, optimizer)
    fxpar.export_safetensors(Path(folder) / "exported", module)
    seen: list[str] = []
    for name, p in module.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    module(**mine)["loss"].mul(2).backward()
    with module.no_sync():
        module.train_step(**mine)
    out["seen"] = sorted(seen) == sorted(2 * [n for n, _ in module.named_parameters()])
    out["accumulated"] = gradients(module)
    module.eval()
    shown = module.eval_step(**{k: v[:4] for k, v in mine.items()})
    out["eval"] = shown["loss"].item(), None if shown["logits"] is None else full(shown["logits"]), module.replica
    module.train()
    module.zero_grad()
    for name, p in module.named_parameters():
        p.requires_grad_(not name.startswith(("embed", "layers.0")))
    module(**mine)["loss"].backward()
    out["frozen"] = gradients(module)
    for p in module.parameters():
        p.requires_grad_(True)
    module.zero_grad()
    module(**mine)["loss"].backward()
    out["thawed"] = gradients(module)
    out["gathered"] = sorted(get_model_state_dict(module, options=StateDictOptions(full_state_dict=True)))
    again = parallel(net()[0], plan, batch)
    again.load_state_dict({n: module.state_dict().get(n, torch.zeros(1)) for n in net()[0].state_dict()})
    out["again"] = state(again)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    other = torch.optim.AdamW(again.parameters(), lr=0.5)
    fxpar.load_checkpoint(Path(folder) / "saved", again, other)
    out["loaded"] = state(again)
    out["lr"] = other.param_groups[0]["lr"], len(other.state) == len(list(again.parameters()))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["pp=4,microbatches=4", "pp=2,dp=2,zero=3,microbatches=2"])
def test_training_equals_one_process(plan, tmp_path):
    check_training(plan, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("plan", ["pp=2,tp=2,microbatches=2", "pp=2,dp=2,microbatches=4", "pp=2,dp=2,zero=1,microbatches=2",
                                  "pp=2,dp=2,zero=2,microbatches=2", "pp=2,tp=2,schedule=zbv,virtual_stages=2,microbatches=2"])
def test_training_equals_one_process_under_other_plans(plan, backend, tmp_path):
    check_training(plan, tmp_path, backend)


def check_training(plan: str, folder: Path, backend: str = "eager") -> None:
    found = launch(4, trained, plan, str(folder), backend, timeout=300)
    model, batch = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    want, last = steps(model, batch, optimizer), {n: t.clone() for n, t in model.state_dict().items()}
    grads = {}
    for name, scale in (("accumulated", 3), ("frozen", 1)):
        model.zero_grad()
        (scale * model(**batch)["loss"]).backward()
        grads[name] = gradients(model)
    n = fxpar.Plan.parse(plan).dp
    few = {k: torch.cat([v.chunk(n)[i][:4] for i in range(n)]) for k, v in batch.items()}
    shown = model.eval()(**few)
    assert set().union(*(one["state"] for one in found)) == set(last)
    for one in found:
        for have, (loss, norm) in zip(one["steps"], want, strict=True):
            assert have[0] == pytest.approx(loss, rel=1e-6) and have[1] == pytest.approx(norm, rel=1e-5)
        close(one["state"], last)
        close(one["accumulated"], grads["accumulated"])
        close(one["thawed"], grads["frozen"])
        assert not any(name.startswith(("embed", "head", "layers.0")) for name in one["frozen"])
        assert one["seen"] and one["gathered"] == sorted(one["state"]) and one["lr"] == (0.01, True)
        close(one["frozen"] or {"": torch.zeros(())}, {**grads["frozen"], "": torch.zeros(())})
        close(one["loaded"], last)
        close(one["again"], last)
        assert one["eval"][0] == pytest.approx(shown["loss"].item(), rel=1e-5)
    logits = {one["eval"][2]: one["eval"][1] for one in found if one["eval"][1] is not None}
    assert len(logits) == n
    torch.testing.assert_close(torch.cat([logits[i] for i in sorted(logits)]), shown["logits"])
    plain, other = net()[0], None
    other = torch.optim.AdamW(plain.parameters())
    fxpar.load_checkpoint(folder / "saved", plain, other)
    close(dict(plain.state_dict()), last)
    close({n: t for file in (folder / "exported").glob("*.safetensors") for n, t in load_file(file).items()}, last)


def odds(rank: int, folder: str, plan: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, options in (("balance", {"balance": True}), ("norm", {"norm": True}), ("dropout", {"dropout": 0.3})):
        model, batch = net(**options)
        module = parallel(model, plan, batch)
        module.seed = 5
        mine = rows(batch, module)
        loss = module(**mine)["loss"]
        loss.backward()
        out[name] = loss.item(), gradients(module), {n: b.clone() for n, b in module.named_buffers()}
    with torch.device("meta"):
        empty = Net()
    module = parallel(empty, plan, batch)
    module.init_weights(3)
    out["initialised"] = state(module)
    fxpar.save_checkpoint(Path(folder) / "one", module)
    other = parallel(net()[0], "dp=4,zero=3", batch)
    fxpar.load_checkpoint(Path(folder) / "one", other)
    fxpar.save_checkpoint(Path(folder) / "two", other)
    fxpar.load_checkpoint(Path(folder) / "two", module)
    out["over"] = state(module)
    out["said"] = []
    for given in ({"ids": batch["ids"]}, None):
        try:
            Soft.check(plan, module, given)
        except InputError as error:
            out["said"].append(str(error))
    return out


class Soft(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh()).square().mean()

    @staticmethod
    def check(plan: str, module: Any, given: Any) -> None:
        if given is not None:
            module(**rows(given, module))
        x = torch.ones(16, 8, requires_grad=True)
        soft = parallel(Soft(), plan, {"x": x.detach()})
        soft(x.chunk(soft.plan.dp)[soft.replica].detach().requires_grad_())


def by_definition(**options: Any) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients and buffers of a step in two microbatches of two replicas, by hand: labels are counted in the whole batch;
    what is not linear is the mean over microbatches, each of which has rows of both replicas."""
    model, batch = net(**options)
    total = torch.zeros(())
    for part in torch.arange(16).view(2, 2, 4).unbind(1):
        ids, target = batch["ids"][part.flatten()], batch["target"][part.flatten()]
        logits = model(ids)["logits"]
        total = total + F.cross_entropy(logits, target, ignore_index=-1, reduction="sum") / (batch["target"] != -1).sum()
        total = total + model.balance * logits.softmax(-1).mean(0).square().sum() / 2
    total.backward()
    return total.item(), {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.slow
def test_what_is_joined_updated_drawn_and_refused(tmp_path):
    found = launch(4, odds, str(tmp_path), CONNECTED)
    for name, options in (("balance", {"balance": True}), ("norm", {"norm": True}), ("dropout", {})):
        want, wanted, new = by_definition(**options)
        for loss, grads, buffers in [one[name] for one in found]:
            if name != "dropout":
                assert loss == pytest.approx(want, rel=1e-6)
                close(grads, wanted)
                assert buffers.keys() <= new.keys()
            for at, buffer in buffers.items():
                assert torch.equal(buffer, found[0][name][2][at])
                if at != "norm.num_batches_tracked":  # it counts steps
                    torch.testing.assert_close(buffer, new[at])
            assert name != "norm" or buffers["norm.num_batches_tracked"] == 1
            assert loss == found[0][name][0]
    plain, batch = net()
    assert found[0]["dropout"][0] != pytest.approx(plain(**batch)["loss"].item(), rel=1e-6)
    torch.manual_seed(3)
    plain = Net()
    for module in plain.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    torch.manual_seed(3)
    for module in plain.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for one in found:
        close(one["initialised"], dict(plain.state_dict()))
        close(one["over"], dict(plain.state_dict()))
        assert "compute its loss" in one["said"][0] and "wants a gradient" in one["said"][1]


def failing(rank: int, plan: str, where: str) -> list[Any]:
    model, batch = net()
    module = parallel(model, plan, batch)
    mine = rows(batch, module)
    module(**mine)["loss"].backward()
    original = getattr(StageOfRank, where)

    def broken(stage: Any, microbatch: int, *args: Any) -> Any:
        if rank == 2 and microbatch == 1:
            raise ValueError("one rank's own trouble")
        return original(stage, microbatch, *args)

    setattr(StageOfRank, where, broken)
    begin, said = time.monotonic(), []
    for _ in range(2):
        try:
            module(**mine)["loss"].backward()
        except (FxparError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return [time.monotonic() - begin, said]


@pytest.mark.parametrize("plan, where", [("pp=2,tp=2,microbatches=2", "forward"), ("pp=4,microbatches=2", "weight_gradients")])
def test_an_error_on_one_rank_ends_the_step_on_all(plan, where):
    for rank, (seconds, said) in enumerate(launch(4, failing, plan, where)):
        own = "ValueError: one rank's own trouble"
        named = f"FxparError: rank 2 failed in the middle of forward, which ended it on all ranks: {own}"
        assert seconds < 30 and len(said) == 2 and said[1].startswith(named)
        assert said[0] == own if rank == 2 else said[0].startswith(named)


def refused_optimizer(rank: int) -> str:
    model, batch = net()
    module = parallel(model, "pp=2,microbatches=2", batch)
    optimizer = torch.optim.LBFGS(module.parameters())
    try:
        optimizer.step(lambda: module(**batch)["loss"])
    except InputError as error:
        return str(error)
    return ""


def test_an_optimizer_of_all_parameters_at_once_is_refused():
    """A rank has those of its stages."""
    assert all("LBFGS cannot step the parameters of a pipeline" in said for said in launch(2, refused_optimizer))
