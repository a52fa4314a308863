"""Hugging Face's Trainer on ranks: losses, norms, files and resumed runs are those of one process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxpar
from tests.integrations.training import BATCH, as_torchrun, build, parallel, rows, same_change, same_lines, weights
from tests.processes import launch

pytestmark = [pytest.mark.integrations, pytest.mark.multiproc]
SCORES = ("eval_loss", "eval_accuracy", "eval_rows")
LOGGED = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy", "step", "total_flos")


def arguments(folder: Path, size: int, **options: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(**{**dict(
        output_dir=str(folder), per_device_train_batch_size=size, per_device_eval_batch_size=size, gradient_accumulation_steps=2,
        max_steps=6, logging_steps=1, save_steps=3, eval_steps=3, eval_strategy="steps", max_grad_norm=0.5, learning_rate=0.5,
        optim="sgd", dataloader_pin_memory=False, use_cpu=True, report_to=[], disable_tqdm=True), **options})


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
    scores = trainer.evaluate()
    return log, {name: scores[name] for name in SCORES if name in scores}


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
            same_lines([*got, of_ranks], [*want, scores])
            assert want[0]["loss"] > want[-3]["loss"]
        if "optim" not in options:
            same_change(weights(many / "final"), weights(one / "final"))

    return compared


@pytest.mark.parametrize("plan", ["dp=2,zero=3", "tp=2"])
def test_runs_are_those_of_one_process(compare, plan):
    compare(plan)


def test_four_ranks(compare):
    compare("dp=2,tp=2,zero=2")


def test_adam_with_its_defaults(compare):
    """Losses and norms alone; of weights see `same_change`."""
    compare("dp=2,zero=3", optim="adamw_torch_fused", learning_rate=1e-2)


def test_a_pipeline(compare):
    compare("pp=2,microbatches=2", prediction_loss_only=True, evaluated=16)


def test_a_loss_that_the_trainer_computes(compare):
    compare("dp=2", by_hand=True)


def test_label_smoothing(compare):
    compare("dp=2", label_smoothing_factor=0.1)


def test_a_model_of_which_a_part_is_trained(compare):
    compare("dp=2", freeze=True)


def test_a_resumed_run_goes_on_exactly(tmp_path):
    adam = {"optim": "adamw_torch_fused", "learning_rate": 1e-2}
    (want, _), _ = launch(2, trained, "dp=2", tmp_path / "run", False, adam)
    before = weights(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    (got, _), _ = launch(2, trained, "dp=2", tmp_path / "run", True, adam)
    assert got[:-1] == want[:-1]
    after = weights(tmp_path / "run" / "final")
    assert all(torch.equal(after[name], before[name]) for name in before)
    (elsewhere, _), _ = launch(2, trained, "tp=2", tmp_path / "run", True, adam)
    same_lines(elsewhere[:-1], want[:-1])


def with_habits(rank: int, plan: str | None, folder: Path) -> tuple[list[dict], list]:
    """Numbers, and what is to be equal: the best model is loaded at the end, old checkpoints are removed, a callback stops the
    run; predictions; several data sets; a rate that follows the loss; a stream; checkpointed blocks."""
    import transformers

    from fxpar.integrations.transformers import Trainer

    as_torchrun(rank)
    kind, size = (transformers.Trainer, BATCH) if plan is None else (Trainer, BATCH // fxpar.Plan.parse(plan).dp)

    def trainer(options: dict[str, Any], data: Any, **more: Any) -> Any:
        model = build() if plan is None else parallel(build(), plan)
        return kind(model, arguments(folder, size, **options), train_dataset=data, **more)

    def lines(of: Any) -> list[dict]:
        return [{name: x for name, x in line.items() if name.endswith(LOGGED)} for line in of.state.log_history]

    best = trainer(dict(load_best_model_at_end=True, metric_for_best_model="eval_accuracy", save_total_limit=1, save_steps=2,
                        eval_steps=2, learning_rate=2.0), rows(), eval_dataset=rows(13), compute_metrics=accuracy,
                   callbacks=[transformers.EarlyStoppingCallback(1)])
    best.train()
    chosen = best.evaluate()
    told = best.predict(rows(13))
    kept = [sorted(path.name for path in folder.glob("checkpoint-*")), Path(best.state.best_model_checkpoint).name,
            best.state.global_step, told.predictions.shape, told.label_ids.tolist()]
    sums = {f"row {n}": float(row.sum()) for n, row in enumerate(abs(told.predictions))}
    several = trainer(dict(lr_scheduler_type="reduce_lr_on_plateau", metric_for_best_model="eval_a_loss", save_strategy="no",
                           eval_on_start=True, max_steps=3, gradient_checkpointing=True),
                      Stream(), eval_dataset={"a": rows(13), "b": rows()[20:30]})
    several.train()
    return [*lines(best), {name: chosen[name] for name in SCORES}, sums, *lines(several)], kept


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(rows())


@pytest.mark.parametrize("plan", ["dp=2", "tp=2"])
def test_what_people_ask_of_a_trainer(tmp_path, plan):
    (want, as_said), = launch(1, with_habits, None, tmp_path / "one")
    assert as_said[0] == [as_said[1]] and as_said[2] < 6
    for got, said in launch(2, with_habits, plan, tmp_path / "many"):
        same_lines(got, want)
        assert said == as_said


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


