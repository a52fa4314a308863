"""Hugging Face's Trainer on ranks: losses, norms, files and resumed runs are those of one process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxpar
from tests.integrations.training import BATCH, as_torchrun, build, close, parallel, rows, weights
from tests.processes import launch

pytestmark = [pytest.mark.integrations, pytest.mark.multiproc]
SCORES = ("eval_loss", "eval_accuracy", "eval_rows")
LOGGED = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy", "step", "total_flos")


def arguments(folder: Path, size: int, **options: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(**{**dict(
        output_dir=str(folder), per_device_train_batch_size=size, per_device_eval_batch_size=size, gradient_accumulation_steps=2,
        max_steps=6, logging_steps=1, save_steps=3, eval_steps=3, eval_strategy="steps", max_grad_norm=0.5, learning_rate=1e-2,
        adam_epsilon=1e-4, dataloader_pin_memory=False, use_cpu=True, report_to=[], disable_tqdm=True), **options})


def accuracy(prediction: Any) -> dict[str, float]:
    told, labels = prediction.predictions.argmax(-1)[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": float((told == labels)[labels != -100].mean()), "rows": len(labels)}


def trained(rank: int, plan: str | None, folder: Path, resume: bool, options: dict[str, Any]) -> tuple[list, dict]:
    """The log of a run, and the last evaluation. plan: None for transformers' own Trainer."""
    import transformers

    from fxpar.integrations.transformers import Trainer

    as_torchrun(rank)
    options = dict(options)
    count = options.pop("evaluated", 13)
    metrics = {} if options.pop("prediction_loss_only", False) else {"compute_metrics": accuracy}
    loss = {"compute_loss_func": by_hand} if options.pop("by_hand", False) else {}
    if plan is None:
        model, kind, size = build(), transformers.Trainer, BATCH
    else:
        model, kind = parallel(build(), plan), Trainer
        size = BATCH // model.replica.count
    if options.pop("freeze", False):
        model.model.embed_tokens.weight.requires_grad_(False)
    trainer = kind(model, arguments(folder, size, **options), train_dataset=rows(), eval_dataset=rows()[:count],
                   **metrics, **loss)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    trainer.save_model(str(folder / "final"))
    log = [{name: line[name] for name in LOGGED if name in line} for line in trainer.state.log_history]
    return log, trainer.evaluate()


def by_hand(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits, wanted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum") / num_items_in_batch


@pytest.fixture(scope="module")
def compare(tmp_path_factory) -> Callable[..., None]:
    """Compares a run under a plan with that of one process, which is made once for the same options."""
    made: dict[str, tuple[tuple[list, dict], Path]] = {}

    def compared(plan: str, **options: Any) -> None:
        if repr(options) not in made:
            folder = tmp_path_factory.mktemp("one")
            made[repr(options)] = launch(1, trained, None, folder, False, options)[0], folder
        (want, scores), one = made[repr(options)]
        ranks, many = fxpar.Plan.parse(plan), tmp_path_factory.mktemp("many")
        for got, of_ranks in launch(ranks.dp * ranks.tp * ranks.pp, trained, plan, many, False, options):
            close(got, want)
            assert want[0]["loss"] > want[-3]["loss"]
            close([of_ranks.get(name) for name in SCORES], [scores.get(name) for name in SCORES])
        close(weights(many / "final"), weights(one / "final"))

    return compared


@pytest.mark.parametrize("plan", ["dp=2,zero=3", "tp=2"])
def test_runs_are_those_of_one_process(compare, plan):
    compare(plan)


def test_four_ranks(compare):
    compare("dp=2,tp=2,zero=2")


def test_a_pipeline(compare):
    compare("pp=2,microbatches=2", prediction_loss_only=True, evaluated=16)


def test_a_loss_that_the_trainer_computes(compare):
    compare("dp=2", by_hand=True)


def test_label_smoothing(compare):
    compare("dp=2", label_smoothing_factor=0.1)


def test_a_model_of_which_a_part_is_trained(compare):
    compare("dp=2", freeze=True)


def test_a_resumed_run_goes_on_exactly(tmp_path):
    (want, _), _ = launch(2, trained, "dp=2", tmp_path / "run", False, {})
    before = weights(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    (got, _), _ = launch(2, trained, "dp=2", tmp_path / "run", True, {})
    assert got[:-1] == want[:-1]
    after = weights(tmp_path / "run" / "final")
    assert all(torch.equal(after[name], before[name]) for name in before)
    (elsewhere, _), _ = launch(2, trained, "tp=2", tmp_path / "run", True, {})
    close(elsewhere[:-1], want[:-1])


def refused(rank: int, folder: Path) -> list[str]:
    from fxpar.integrations.transformers import Trainer

    as_torchrun(rank)
    said = []

    def attempt(make: Any) -> None:
        with pytest.raises((fxpar.InputError, fxpar.PlanError)) as error:
            make()
        said.append(str(error.value))

    attempt(lambda: Trainer(build(), arguments(folder, 4), eval_dataset=rows()))
    attempt(lambda: Trainer(parallel(build(), "dp=2,microbatches=2"), arguments(folder, 4), eval_dataset=rows()))
    module = parallel(build(), "dp=2")
    attempt(lambda: Trainer(module, arguments(folder, 4, average_tokens_across_devices=False), eval_dataset=rows()))
    attempt(lambda: Trainer(module, arguments(folder, 4, bf16=True), eval_dataset=rows()))
    floats = [{**row, "labels": torch.rand(16)} for row in rows(13)]
    trainer = Trainer(module, arguments(folder, 4), train_dataset=rows(), eval_dataset=rows(),
                      compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.mean() + labels.mean())
    attempt(lambda: trainer.evaluate(floats))
    return said


def test_what_cannot_be_is_refused(tmp_path):
    for of_plain, microbatches, tokens, precision, filled in launch(2, refused, tmp_path):
        assert "write model=fxpar.parallelize(model, plan)" in of_plain
        assert "gradient_accumulation_steps" in microbatches
        assert "average_tokens_across_devices=True, the default" in tokens
        assert "Plan(param_dtype='bf16', reduce_dtype='fp32')" in precision
        assert "3 rows are repeated to fill up the last batch" in filled


