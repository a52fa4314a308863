"""Loops through accelerate and Fabric: a step, its accumulation, a checkpoint and what follows it are those of plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxpar
from tests.integrations.training import (
    BATCH,
    as_torchrun,
    batch,
    build,
    parallel,
    rows,
    same_change,
    same_lines,
    weights,
)
from tests.processes import launch

pytestmark = [pytest.mark.integrations, pytest.mark.multiproc]
Line = dict[str, float]
"""Loss of a step's second batch, norm of its gradients, learning rate."""


def optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def line(loss: torch.Tensor, norm: torch.Tensor, rates: Any) -> Line:
    return {"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": rates.get_last_lr()[0]}


def schedule(opt: torch.optim.Optimizer, of_step: int = 1) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step / of_step))


def plain(order: list[list[int]]) -> tuple[list[Line], dict[str, torch.Tensor]]:
    model = build()
    opt = optimizer(model)
    rates, data, lines = schedule(opt), rows(), []
    for number, numbers in enumerate(order):
        loss = model(**batch([data[i] for i in numbers])).loss
        (loss / 2).backward()
        if number % 2:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            lines.append(line(loss, norm, rates))
            opt.step()
            rates.step()
            opt.zero_grad()
    return lines, dict(model.named_parameters())


def in_order() -> list[list[int]]:
    return [[*range(BATCH * number, BATCH * (number + 1))] for number in range(6)]


def with_accelerate(rank: int, plan: str, folder: Path) -> dict[str, Any]:
    from fxpar.integrations.accelerate import Accelerator

    as_torchrun(rank)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(fxpar.InputError, match="prepare the parallel module first"):
        accelerator.prepare(torch.utils.data.DataLoader(rows()))
    with pytest.raises(fxpar.InputError, match="is a plain module"):
        accelerator.prepare(build())
    model = parallel(build(), plan)
    opt = optimizer(model)
    loader = torch.utils.data.DataLoader(rows(), batch_size=BATCH // model.replica.count)
    model, opt, loader, rates = accelerator.prepare(model, opt, loader, schedule(opt, model.replica.count))
    lines: list[Line] = []

    def train(batches: Any, save_after: int = -1) -> None:
        for number, inputs in enumerate(batches):
            with accelerator.accumulate(model):
                loss = model(**inputs).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    lines.append(line(loss, norm, rates))
                opt.step()
                rates.step()
                opt.zero_grad()
            if number == save_after:
                accelerator.save_state(str(folder / "state"))

    train(loader, save_after=3)
    first = {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}
    accelerator.load_state(str(folder / "state"))
    train(accelerator.skip_first_batches(loader, 4))
    assert all(torch.equal(first[name], p.full_tensor()) for name, p in model.named_parameters())
    accelerator.save_model(model, folder / "model")
    with pytest.raises(fxpar.InputError, match=r"without model\.embed_tokens\.weight"):
        accelerator.clip_grad_norm_([*model.parameters()][1:], 1.0)
    state = accelerator.get_state_dict(model)
    return {"lines": lines, "count": accelerator.num_processes, "sum": accelerator.reduce(torch.ones(2)).tolist(),
            "gathered": accelerator.gather(torch.tensor([accelerator.process_index])).tolist(), "state": len(state)}


@pytest.mark.parametrize("plan", ["dp=2,zero=3", "dp=2,tp=2"])
def test_accelerate(tmp_path, plan):
    ranks = fxpar.Plan.parse(plan)
    want, trained = plain(in_order())
    for rank, out in enumerate(launch(ranks.dp * ranks.tp, with_accelerate, plan, tmp_path)):
        same_lines(out["lines"], [*want, want[-1]])
        assert (out["count"], out["sum"], out["gathered"]) == (2, [2.0, 2.0], [0, 1])
        assert out["state"] == (21 if rank == 0 else 0)
    same_change(weights(tmp_path / "model"), trained)


def habits_with_accelerate(rank: int, plan: str, folder: Path) -> None:
    from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration

    from fxpar.integrations.accelerate import Accelerator

    as_torchrun(rank)
    accelerator = Accelerator(
        cpu=True, project_config=ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, total_limit=1),
        dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True))
    model = parallel(build(), plan)
    opt, size = optimizer(model), BATCH // model.replica.count
    data = torch.utils.data.DataLoader(rows(), size)
    held_out = torch.utils.data.DataLoader([{**row, "number": torch.tensor(n)} for n, row in enumerate(rows(13))], size)
    model, opt, data, held_out = accelerator.prepare(model, opt, data, held_out)

    numbers, told = [], []
    model.eval()
    for inputs in held_out:  # its last batch is filled up
        number = inputs.pop("number")
        with torch.no_grad():
            logits = model(**inputs).logits
        logits, number = accelerator.gather_for_metrics((logits, number))
        numbers += number.tolist()
        told.append(logits)
    model.train()
    assert numbers == [*range(13)]
    torch.testing.assert_close(torch.cat(told), build()(**batch(rows(13))).logits, rtol=1e-5, atol=1e-6)
    assert accelerator.unwrap_model(model) is model
    with accelerator.split_between_processes([*range(2 * model.replica.count)]) as mine:
        assert mine == [2 * model.replica, 2 * model.replica + 1]

    class Counter:
        count = 0

        def state_dict(self) -> dict[str, int]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.count = state["count"]

    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    seen = []
    for inputs in data:
        seen.append((inputs["input_ids"].tolist(), inputs["labels"].tolist()))
        counter.count += 1
        loss = model(**inputs).loss
        accelerator.backward(loss)
        accelerator.clip_grad_value_(model.parameters(), 1e-3)
        assert max(p.grad.full_tensor().abs().max() for p in model.parameters()) <= 1.001e-3
        opt.step()
        opt.zero_grad()
        if len(seen) in (1, 2):
            accelerator.save_state()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint_1"]
    accelerator.load_state()  # the newest
    assert counter.count == 2
    again = [(inputs["input_ids"].tolist(), inputs["labels"].tolist()) for inputs in data]
    assert again == seen[2:] and len(again) == 4


@pytest.mark.parametrize("plan", ["dp=2", "tp=2"])
def test_what_people_ask_of_accelerate(tmp_path, plan):
    launch(2, habits_with_accelerate, plan, tmp_path)


def saving_fails_on_rank_0(rank: int, folder: Path) -> None:
    from fxpar.integrations.accelerate import Accelerator
    from fxpar.integrations.transformers import save_pretrained

    as_torchrun(rank)
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(parallel(build(), "dp=2"))

    def trouble(*_: Any, **__: Any) -> None:
        if rank == 0:
            raise OSError("no room")

    (folder / "file").touch()
    for save in (lambda path: accelerator.save_model(model, path), lambda path: save_pretrained(path, model)):
        with pytest.raises(fxpar.CheckpointError, match="file"):
            save(folder / "file" / "model")
    model.generation_config.save_pretrained = trouble
    with pytest.raises(fxpar.CheckpointError, match="no room"):
        save_pretrained(folder / "model", model)
    handle = accelerator.register_save_state_pre_hook(trouble)
    with pytest.raises(OSError if rank == 0 else fxpar.FxparError, match="no room"):
        accelerator.save_state(str(folder / "state"))
    handle.remove()
    accelerator.save_state(str(folder / "state"))
    accelerator.register_load_state_pre_hook(trouble)
    with pytest.raises(OSError if rank == 0 else fxpar.FxparError, match="no room"):
        accelerator.load_state(str(folder / "state"))


def test_saving_that_fails_on_rank_0_fails_on_all(tmp_path):
    launch(2, saving_fails_on_rank_0, tmp_path, timeout=100)


def of_replicas(plan: fxpar.Plan) -> list[list[int]]:
    """Replicas take turns, row by row, as those of a `DistributedSampler` do."""
    return [[BATCH * number + plan.dp * i + replica for replica in range(plan.dp) for i in range(BATCH // plan.dp)]
            for number in range(6)]


def with_fabric(rank: int, plan: str, folder: Path) -> tuple[list[Line], dict[str, torch.Tensor]]:
    from lightning_fabric import Fabric

    from fxpar.integrations.lightning import FxparStrategy

    as_torchrun(rank)
    fabric = Fabric(accelerator="cpu", devices=torch.distributed.get_world_size(), strategy=FxparStrategy())
    fabric.launch()
    with pytest.raises(fxpar.InputError, match=r"call fabric\.setup\(module, optimizer\) before"):
        fabric.setup_dataloaders(torch.utils.data.DataLoader(rows()))
    with pytest.raises(fxpar.InputError, match="is a plain module"):
        fabric.setup(build())
    model = module = parallel(build(), plan)
    opt = optimizer(model)
    rates = schedule(opt)
    loader = torch.utils.data.DataLoader(rows(), batch_size=BATCH // model.replica.count)
    model, opt = fabric.setup(model, opt)
    loader = fabric.setup_dataloaders(loader)
    state = {"model": model, "opt": opt, "rates": rates, "number": 0}
    lines: list[Line] = []

    def train(first: int) -> None:
        for number, inputs in enumerate(loader):
            if number < first:
                continue
            with fabric.no_backward_sync(model, enabled=number % 2 == 0):
                loss = model(**inputs).loss
                fabric.backward(loss / 2)
            if number % 2:
                norm = fabric.clip_gradients(model, opt, max_norm=0.5)
                lines.append(line(loss, norm, rates))
                opt.step()
                rates.step()
                opt.zero_grad()
            if (number, first) == (3, 0):
                fabric.save(folder / "state", {**state, "number": number})

    train(0)
    fabric.load(folder / "state", state)
    assert state["number"] == 3
    train(4)
    logits = model(**batch(rows()[: BATCH // module.replica.count])).logits.detach()
    whole = fabric.all_gather({"logits": logits})["logits"]
    assert whole.shape == (fabric.world_size, BATCH // module.replica.count, 16, 32) and torch.equal(whole[0], whole[-1])
    model(**batch(rows()[: BATCH // module.replica.count])).loss.backward()
    fabric.clip_gradients(model, opt, clip_val=1e-3)
    assert max(p.grad.full_tensor().abs().max() for p in model.parameters()) <= 1.001e-3
    with pytest.raises(fxpar.InputError, match="needs a dict with the module"):
        fabric.load(folder / "state")
    return lines, {name: p.full_tensor().detach() for name, p in module.named_parameters()}


@pytest.mark.parametrize("plan", ["dp=2,zero=3", "dp=2,tp=2"])
def test_fabric(tmp_path, plan):
    ranks = fxpar.Plan.parse(plan)
    want, trained = plain(of_replicas(ranks))
    for lines, weights_of_run in launch(ranks.dp * ranks.tp, with_fabric, plan, tmp_path):
        same_lines(lines, [*want, want[-1]])
        same_change(weights_of_run, trained)
