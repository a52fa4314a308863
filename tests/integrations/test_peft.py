"""Adapters: trained on ranks as on one process, saved for peft's own loader, and read back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fxpar
from tests.integrations.training import BATCH, as_torchrun, batch, build, close, parallel, rows
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
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, eps=1e-4) for m in (plain, module)]
    for step in range(3):
        of_step = rows()[BATCH * step : BATCH * (step + 1)]
        mine = batch(of_step[size * module.replica : size * (module.replica + 1)])
        losses = []
        for model, opt, inputs in zip((plain, module), optimizers, (batch(of_step), mine)):
            loss = model(**inputs).loss
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
        close(losses[1], losses[0])
    save_adapters(folder, module)
    read = peft.PeftModel.from_pretrained(build(), str(folder))
    want, got = (peft.get_peft_model_state_dict(m) for m in (plain, read))
    assert want.keys() == got.keys()
    close(got, want)
    other = parallel(adapted(kind), plan)
    load_adapters(folder, other)
    inputs = batch(rows()[:BATCH][size * module.replica : size * (module.replica + 1)])
    close(other.eval_step(**inputs).loss, module.eval_step(**inputs).loss)
    with pytest.raises(fxpar.InputError, match=r"takes what fxpar\.parallelize made of a PeftModel"):
        save_adapters(folder, parallel(build(), plan))


@pytest.mark.parametrize("kind, plan", [("lora", "dp=2,tp=2"), ("lora", "pp=2,microbatches=2"), ("dora", "dp=2,zero=3"),
                                        ("prompt", "tp=2")])  # fmt: skip
def test_adapters_go_round(tmp_path, kind, plan):
    ranks = fxpar.Plan.parse(plan)
    launch(ranks.dp * ranks.tp * ranks.pp, trained, kind, plan, tmp_path)


def of_other(rank: int, folder: Path) -> None:
    from fxpar.integrations.peft import load_adapters, save_adapters

    as_torchrun(rank)
    save_adapters(folder, parallel(adapted("dora"), "dp=2"))
    with pytest.raises(fxpar.CheckpointError, match="and the one in the folder differ in"):
        load_adapters(folder, parallel(adapted("lora"), "dp=2"))


def test_adapters_of_another_config(tmp_path):
    launch(2, of_other, tmp_path)
