"""Adapters: trained on ranks as on one process, saved for peft's own loader, and read back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fxpar
from tests.integrations.training import BATCH, as_torchrun, batch, build, parallel, rows, same_change, same_lines
from tests.processes import launch

pytestmark = [pytest.mark.integrations, pytest.mark.multiproc]


def adapted(kind: str) -> Any:
    import peft

    options = dict(
        lora=lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]),
        dora=lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True),
        prompt=lambda: peft.PromptTuningConfig(num_virtual_tokens=4),
    )[kind]()
    options.task_type = "CAUSAL_LM"
    model = build()
    torch.manual_seed(5)
    return peft.get_peft_model(model, options)


def trained(rank: int, kind: str, plan: str, folder: Path) -> None:
    import peft

    from fxpar.integrations.peft import load_adapters, save_adapters

    warnings.simplefilter("ignore")
    as_torchrun(rank)
    plain, module = adapted(kind), parallel(adapted(kind), plan)
    size = BATCH // module.replica.count
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5) for m in (plain, module)]
    for step in range(3):
        of_step = rows()[BATCH * step : BATCH * (step + 1)]
        mine = batch(of_step[size * module.replica : size * (module.replica + 1)])
        losses = []
        for model, opt, inputs in zip((plain, module), optimizers, (batch(of_step), mine)):
            loss = model(**inputs).loss
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append({"loss": loss.item()})
        same_lines(losses[1:], losses[:1])
    save_adapters(folder, module)
    read = peft.PeftModel.from_pretrained(build(), str(folder))
    same_change(*(peft.get_peft_model_state_dict(m) for m in (read, plain, adapted(kind))))
    other = parallel(adapted(kind), plan)
    load_adapters(folder, other)
    inputs = batch(rows()[:BATCH][size * module.replica : size * (module.replica + 1)])
    assert other.eval_step(**inputs).loss.item() == module.eval_step(**inputs).loss.item()


@pytest.mark.parametrize("kind, plan", [("lora", "dp=2,tp=2"), ("lora", "pp=2,microbatches=2"), ("dora", "dp=2,zero=3"),
                                        ("prompt", "tp=2")])  # fmt: skip
def test_adapters_go_round(tmp_path, kind, plan):
    ranks = fxpar.Plan.parse(plan)
    launch(ranks.dp * ranks.tp * ranks.pp, trained, kind, plan, tmp_path)


def two() -> Any:
    import peft

    model = build()
    torch.manual_seed(5)
    options = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **options))
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"], **options))
    return model


def used(rank: int, plan: str, folder: Path) -> None:
    import copy

    import peft

    from fxpar.integrations.peft import load_adapters, save_adapters

    warnings.simplefilter("ignore")
    as_torchrun(rank)
    plain, module = two(), parallel(two(), plan)
    size = BATCH // module.replica.count
    inputs = [batch(rows()[:BATCH]), batch(rows()[:BATCH][size * module.replica : size * (module.replica + 1)])]
    seen = []

    def same() -> None:
        losses = [{"loss": m(**i).loss.item()} for m, i in zip((plain, module), inputs)]
        same_lines(losses[1:], losses[:1])
        seen.append(round(losses[0]["loss"], 4))

    same()
    with plain.disable_adapter(), module.disable_adapter():
        same()
    for m in (plain, module):
        m.set_adapter("b")
    same()
    for m, i in zip((plain, module), inputs):
        m(**i).loss.backward()
    grads = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    mine = {n: p.grad.full_tensor() for n, p in module.named_parameters() if p.grad is not None}
    assert all(".b." in name for name in grads)
    same_change(mine, grads, {n: torch.zeros_like(g) for n, g in grads.items()})
    save_adapters(folder, module)
    read = peft.PeftModel.from_pretrained(build(), str(folder))
    read.load_adapter(str(folder / "b"), "b")
    for name in ("default", "b"):
        want, got = (peft.get_peft_model_state_dict(m, adapter_name=name) for m in (plain, read))
        assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
    other = parallel(two(), plan)
    load_adapters(folder, other)
    for m in (plain, module, other):
        m.set_adapter("default")
    same()
    assert other(**inputs[1]).loss.item() == module(**inputs[1]).loss.item()
    assert seen[3] == seen[0] and len(set(seen)) == 3
    for method in ("merge_and_unload", "unload", "merge_adapter"):
        with pytest.raises(fxpar.InputError, match=rf"with module\.gathered\(\) as model: model\.{method}"):
            getattr(module, method)()
    with module.gathered(rank0_only=True, offload="cpu") as whole:
        merged = None if whole is None else copy.deepcopy(whole).merge_and_unload()
    assert merged is None or abs(merged(**inputs[0]).loss.item() / seen[0] - 1) < 1e-4
    with module.gathered(write_back=True) as whole:
        whole.merge_adapter()
    plain.merge_adapter()
    same()


@pytest.mark.parametrize("plan", ["dp=2,zero=3", "tp=2"])
def test_adapters_are_switched_and_merged(tmp_path, plan):
    launch(2, used, plan, tmp_path)


def of_other(rank: int, folder: Path) -> None:
    from fxpar.integrations.peft import load_adapters, save_adapters

    as_torchrun(rank)
    save_adapters(folder, parallel(adapted("dora"), "dp=2"))
    with pytest.raises(fxpar.CheckpointError, match="and the one in the folder differ in"):
        load_adapters(folder, parallel(adapted("lora"), "dp=2"))
    with pytest.raises(fxpar.InputError, match=r"takes what fxpar\.parallelize made of a PeftModel"):
        save_adapters(folder, parallel(build(), "dp=2"))


def test_adapters_of_another_config(tmp_path):
    launch(2, of_other, tmp_path)
