"""Checkpoints: whatever saved, whatever loads, training goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fxpar
from fxpar.checkpoint import folder
from fxpar.errors import CheckpointError
from tests import zoo
from tests.processes import launch
from tests.run.test_module import full, parallel, replica_of
from tests.zoo.hugging_face import LLAMA, language_model

STEPS = 3
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1),
}


def nano() -> zoo.Built:
    """As GPT-2: a fused qkv weight and a tied head."""
    return zoo.NanoGPT(dropout=0.0, layers=1), {"idx": zoo.ids(), "targets": zoo.labels()}


def gpt2() -> zoo.Built:
    return language_model("GPT2Config", n_embd=32, n_layer=1, n_head=4, n_positions=64, attn_pdrop=0.0, embd_pdrop=0.0,
                          resid_pdrop=0.0)  # fmt: skip


def tied_llama() -> zoo.Built:
    """Two key/value heads: tp=4 splits them and their group."""
    return language_model("LlamaConfig", **{**LLAMA, "num_hidden_layers": 1}, tie_word_embeddings=True)


class Small(nn.Module):
    """Batch norm (buffers, one of integers), a scalar parameter, a parameter that is not trained and one never used."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, width), nn.BatchNorm1d(width), nn.Linear(width, 4)
        self.scale, self.unused = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.randn(3))
        self.up.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.down(torch.relu(self.norm(self.up(x)))) * self.scale).square().mean()


def small() -> zoo.Built:
    return Small(), {"x": torch.randn(8, 6)}


BUILDERS: dict[str, Callable[[], zoo.Built]] = {"nano": nano, "gpt2": gpt2, "llama": tied_llama, "small": small}


def build(name: str, seed: int = 0) -> zoo.Built:
    """In doubles: what differs differs visibly."""
    torch.manual_seed(0)
    model, batch = BUILDERS[name]()
    if seed:
        torch.manual_seed(seed)
        model, _ = BUILDERS[name]()
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def loss_of(out: Any) -> Tensor:
    return out[1] if isinstance(out, tuple) else getattr(out, "loss", out)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], n: int = STEPS) -> list[float]:
    losses = []
    for _ in range(n):
        loss = loss_of(model(**batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# ---- any plan to any other ----


def go_on(rank: int, plan: str, name: str, optimizer: str, source: str | None, target: str) -> tuple[list[float], list[str]]:
    """Load (or start), train three steps, save; the losses, and how the parameters lay."""
    model, batch = build(name, seed=7 if source else 0)
    if plan != "plain":
        model = parallel(model, plan, batch)
        batch = replica_of(model, batch)
    made = OPTIMIZERS[optimizer](trained(model))
    if source:
        fxpar.load_checkpoint(source, model, made)
    losses = steps(model, made, batch)
    fxpar.save_checkpoint(target, model, made)
    return losses, sorted({str(p.placements) for p in model.parameters() if isinstance(p, DTensor)})


CHAINS = {
    "nano-adamw": ["dp=2,tp=2", "tp=4", "plain", "dp=4"],
    "llama-momentum": ["plain", "tp=2"],
}
SLOW = {
    "nano-fused": ["dp=4,zero=3", "dp=2,tp=2", "plain"],
    "gpt2-adamw": ["dp=2,tp=2", "tp=4", "plain", "dp=4"],
    "gpt2-momentum": ["plain", "dp=2,tp=2,zero=3", "dp=4,zero=3", "tp=2"],
    "llama-foreach": ["tp=4", "dp=2,tp=2,zero=1", "plain", "dp=4,zero=2,dp_replicate=2"],
    "llama-fused": ["dp=4,zero=3", "dp=2,tp=2", "plain"],
    "llama-momentum": ["dp=2", "tp=2", "plain"],
    "small-amsgrad": ["dp=2,zero=3", "plain", "dp=2"],
}


def check_chain(chain: str, plans: list[str], where: Path) -> None:
    name, optimizer = chain.split("-")
    model, batch = build(name)
    want = steps(model, OPTIMIZERS[optimizer](trained(model)), batch, STEPS * len(plans))
    source = None
    for i, plan in enumerate(plans):
        target = str(where / str(i))
        args = (plan, name, optimizer, source, target)
        world = 1 if plan == "plain" else fxpar.Plan.parse(plan).world_size
        answers = [go_on(0, *args)] if plan == "plain" else launch(world, go_on, *args)
        for losses, placements in answers:
            assert losses == pytest.approx(want[STEPS * i : STEPS * (i + 1)], rel=1e-6), plan
            assert "tp" not in plan or name == "llama" or any("_StridedShard" in p for p in placements)
        source = target


@pytest.mark.multiproc
@pytest.mark.parametrize("chain", CHAINS)
def test_training_goes_on_under_another_plan(chain, tmp_path):
    check_chain(chain, CHAINS[chain], tmp_path)


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("chain", SLOW)
def test_training_goes_on_under_more_plans(chain, tmp_path):
    check_chain(chain, SLOW[chain], tmp_path)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 2])
def test_training_goes_on_in_one_process(optimizer, before, tmp_path):
    """Also before the first step, when there is no state; into an optimizer that has some."""
    model, batch = build("small")
    made = OPTIMIZERS[optimizer](trained(model))
    steps(model, made, batch, before)
    fxpar.save_checkpoint(tmp_path / "c", model, made)
    want, end = steps(model, made, batch), model.state_dict()

    module = fxpar.parallelize(build("small", seed=7)[0], "dp=1", batch)
    other = OPTIMIZERS[optimizer](trained(module))
    steps(module, other, batch, 1)
    fxpar.load_checkpoint(tmp_path / "c", module, other)
    assert steps(module, other, batch) == pytest.approx(want, rel=1e-12)
    for key, value in module.state_dict().items():
        torch.testing.assert_close(full(value), end[key])


def test_the_folder_is_one_of_torch_with_readable_names(tmp_path):
    model, batch = build("gpt2")
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    steps(model, optimizer, batch, 1)
    fxpar.save_checkpoint(tmp_path / "c", model, optimizer)
    names = dcp.FileSystemReader(tmp_path / "c").read_metadata().state_dict_metadata
    weight = "transformer.h.0.attn.c_attn.weight"
    assert {n for n in names if weight in n} == {f"model.{weight}"} | {
        f"optimizer.{weight}.{k}" for k in ("step", "exp_avg", "exp_avg_sq")}
    assert "fxpar" in names and not any("lm_head" in n for n in names)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mine = {"model": {k: torch.zeros_like(v) for k, v in model.state_dict().items() if "lm_head" not in k}}
    dcp.load(mine, checkpoint_id=tmp_path / "c")
    assert torch.equal(mine["model"][weight], model.state_dict()[weight])


# ---- options and groups ----


def two_groups(model: nn.Module, lr: float, split: int = 3, **options: Any) -> torch.optim.Optimizer:
    mine = trained(model)
    groups = [{"params": mine[:split]}, {"params": mine[split:], "weight_decay": 0.0, "lr": 2 * lr}]
    return torch.optim.AdamW(groups, lr=lr, **options)


def test_options_are_restored_but_not_how_to_compute(tmp_path):
    model, _ = build("small")
    fxpar.save_checkpoint(tmp_path / "c", model, two_groups(model, 0.5, betas=(0.8, 0.9), fused=True))
    other = two_groups(model, 0.1, foreach=True)
    fxpar.load_checkpoint(tmp_path / "c", model, other)
    assert [(g["lr"], g["weight_decay"], g["betas"]) for g in other.param_groups] == [(0.5, 1e-2, (0.8, 0.9)),
                                                                                      (1.0, 0.0, (0.8, 0.9))]
    assert all(g["foreach"] and not g["fused"] for g in other.param_groups)
    tensor = torch.optim.AdamW(trained(model), lr=torch.tensor(0.3), foreach=False)
    fxpar.save_checkpoint(tmp_path / "t", model, tensor)
    fxpar.load_checkpoint(tmp_path / "t", model, number := torch.optim.AdamW(trained(model), lr=7.0))
    assert number.param_groups[0]["lr"] == pytest.approx(0.3) and isinstance(number.param_groups[0]["lr"], float)


def test_other_groups_of_the_same_parameters(tmp_path):
    model, batch = build("small")
    one = torch.optim.AdamW(trained(model), lr=0.5)
    steps(model, one, batch, 1)
    fxpar.save_checkpoint(tmp_path / "one", model, one)
    two = two_groups(model, 0.1)
    fxpar.load_checkpoint(tmp_path / "one", model, two)
    assert [g["lr"] for g in two.param_groups] == [0.5, 0.5]
    fxpar.save_checkpoint(tmp_path / "two", model, two_groups(model, 0.1))
    fxpar.load_checkpoint(tmp_path / "two", model, finer := two_groups(model, 0.3))
    assert [g["lr"] for g in finer.param_groups] == [0.1, 0.2]
    with pytest.raises(CheckpointError, match=r"group 0 of the optimizer joins parameters .* different lr, weight_decay"):
        fxpar.load_checkpoint(tmp_path / "two", model, one)
    with pytest.raises(CheckpointError, match=r"it does not have: scale"):
        fxpar.load_checkpoint(tmp_path / "two", model, torch.optim.AdamW(trained(model)[1:]))
    with pytest.raises(CheckpointError, match="has the state of AdamW, not of SGD"):
        fxpar.load_checkpoint(tmp_path / "two", model, torch.optim.SGD(trained(model)))


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    model, _ = build("small")
    with pytest.raises(CheckpointError, match=r"has a tensor of shape \(\) that is no parameter"):
        fxpar.save_checkpoint(tmp_path / "c", model, torch.optim.SGD(build("small")[0].parameters()))


def test_dropout_goes_on_where_it_was(tmp_path):
    """Under fxpar masks depend on a seed and a count of steps, which are saved."""
    def made(seed: int) -> tuple[fxpar.ParallelModule, dict[str, Tensor]]:
        torch.manual_seed(0)
        model, batch = zoo.NanoGPT(dropout=0.5, layers=1), {"idx": zoo.ids(), "targets": zoo.labels()}
        torch.manual_seed(seed)
        return fxpar.parallelize(model, "dp=1", batch), batch

    module, batch = made(1)
    module(**batch)
    fxpar.save_checkpoint(tmp_path / "c", module)
    want = module(**batch)[1].item()
    torch.distributed.destroy_process_group()
    other, batch = made(2)
    assert other(**batch)[1].item() != pytest.approx(want, rel=1e-6)
    fxpar.load_checkpoint(tmp_path / "c", other)
    assert other(**batch)[1].item() == want


# ---- dtypes, meta models ----


def test_floating_dtypes_are_converted_and_lossy_kinds_refused(tmp_path):
    model, batch = build("small")
    optimizer = OPTIMIZERS["adamw"](trained(model))
    steps(model, optimizer, batch, 1)
    fxpar.save_checkpoint(tmp_path / "c", model, optimizer)
    half = build("small", seed=7)[0].bfloat16()
    fxpar.load_checkpoint(tmp_path / "c", half, other := OPTIMIZERS["adamw"](trained(half)))
    assert torch.equal(half.up.weight, model.up.weight.bfloat16())
    assert torch.equal(other.state[half.up.weight]["exp_avg"], optimizer.state[model.up.weight]["exp_avg"].bfloat16())
    half.norm.register_buffer("running_mean", torch.zeros(8, dtype=torch.int64))
    with pytest.raises(CheckpointError, match=r"running_mean is torch.float64 there and torch.int64 in the model"):
        fxpar.load_checkpoint(tmp_path / "c", half)


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return BUILDERS[name]()[0].double()


@pytest.mark.parametrize("name", ["llama", "small"])
def test_a_meta_model_is_filled(name, tmp_path):
    model, batch = build(name)
    fxpar.save_checkpoint(tmp_path / "c", model)
    module = fxpar.parallelize(on_meta(name), "dp=1", batch)
    fxpar.load_checkpoint(tmp_path / "c", module)
    assert loss_of(module.eval()(**batch)).item() == pytest.approx(loss_of(model.eval()(**batch)).item(), rel=1e-6)


def test_what_nothing_fills_is_named(tmp_path):
    class Tabled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("table", torch.arange(4.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.table

    fxpar.save_checkpoint(tmp_path / "c", Tabled())
    with torch.device("meta"):
        module = fxpar.parallelize(Tabled(), "dp=1", (torch.ones(2, 4),))
        plain = Tabled()
    with pytest.raises(CheckpointError, match=r"buffer table is on the meta device.*build the model on the CPU"):
        fxpar.load_checkpoint(tmp_path / "c", module)
    with pytest.raises(CheckpointError, match=r"weight is on the meta device.*to_empty"):
        fxpar.load_checkpoint(tmp_path / "c", plain)
    with pytest.raises(CheckpointError, match=r"weight is on the meta device"):
        fxpar.save_checkpoint(tmp_path / "c", plain)


# ---- on ranks ----


def data_file(path: Path) -> Path:
    return next(path.glob("*.distcp"))


def truncate(path: Path) -> None:
    with open(data_file(path), "r+b") as file:
        file.truncate(data_file(path).stat().st_size - 1)


def raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return ""


def background(rank: int, path: str, plan: str) -> list[float]:
    model, batch = build("nano")
    module = parallel(model, plan, batch)
    batch = replica_of(module, batch)
    optimizer = OPTIMIZERS["adamw"](module.parameters())
    steps(module, optimizer, batch, 1)
    first = fxpar.save_checkpoint(path, module, optimizer, asynchronous=True)
    want = steps(module, optimizer, batch)  # the weights change while they are written
    second = fxpar.save_checkpoint(path + "2", module, asynchronous=True)
    assert first.done()
    second.wait()
    fxpar.load_checkpoint(path, module, optimizer)
    assert steps(module, optimizer, batch) == want
    return want


def errors_on_ranks(rank: int, path: str) -> list[str]:
    """What goes wrong, one after the other, on this rank."""
    model, batch = build("small")
    module = fxpar.parallelize(model, "dp=2", replica_of_two(batch, rank))
    optimizer = OPTIMIZERS["adamw"](trained(module))
    fxpar.save_checkpoint(path, module, optimizer)
    before = {k: full(v) for k, v in module.state_dict().items()}
    load = lambda where=path: raised(lambda: fxpar.load_checkpoint(where, module, optimizer))  # noqa: E731
    said = [load(path + "x"), raised(lambda: fxpar.save_checkpoint(f"{path}{rank}", module))]
    said.append(raised(lambda: fxpar.save_checkpoint(path + "y", module, optimizer if rank else None)))
    only = OPTIMIZERS["adamw"](trained(module)[1:]) if rank else optimizer
    said.append(raised(lambda: fxpar.load_checkpoint(path, module, only)))
    real, folder.commit = folder.commit, lambda target: (_ for _ in ()).throw(OSError("crash"))
    said.append(raised(lambda: fxpar.save_checkpoint(path, module)))
    folder.commit = real
    if rank == 1:
        dcp.FileSystemWriter.write_data = lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    said.append(raised(lambda: fxpar.save_checkpoint(path, module)))
    if rank == 0:
        truncate(Path(path))
    torch.distributed.barrier()
    said.append(load())
    assert all(torch.equal(full(v), before[k]) for k, v in module.state_dict().items())
    return said


def replica_of_two(batch: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    return {k: v.chunk(2)[rank] for k, v in batch.items()}


@pytest.mark.multiproc
def test_ranks_train_on_while_they_save(tmp_path):
    assert len({tuple(w) for w in launch(2, background, str(tmp_path / "c"), "tp=2")}) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "c2"]


@pytest.mark.multiproc
def test_every_rank_raises_what_went_wrong_on_one(tmp_path):
    wanted = ["there is no checkpoint", "ranks call save_checkpoint differently in path",
              "ranks call save_checkpoint differently in optimizer: rank 0 with None, rank 1 with 'AdamW'",
              "has other parameters", "crash", "disk full", "truncated"]
    for said in launch(2, errors_on_ranks, str(tmp_path / "c")):
        for text, want in zip(said, wanted, strict=True):
            assert want in text
