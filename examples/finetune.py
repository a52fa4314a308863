"""Fine-tune a small Llama with Hugging Face's Trainer, under any plan.

    torchrun --nproc-per-node=2 examples/finetune.py --check
    torchrun --nproc-per-node=4 examples/finetune.py --plan dp=2,tp=2,zero=1 --check

NCCL where there are GPUs, gloo elsewhere. Needs accelerate: pip install 'fxpar[trainer]'.
"""

import tempfile

import common
import torch
import transformers

import fxpar
from fxpar.integrations.transformers import Trainer


def train(args):
    """The loss of every step, and that of the evaluation at the end."""
    rows = common.rows_of_text(112, 64)
    model, kind, replicas = common.tiny_llama(), transformers.Trainer, 1
    if not args.alone:
        model, kind, replicas = fxpar.parallelize(model, args.plan), Trainer, args.plan.dp

    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(
            model,
            transformers.TrainingArguments(
                output_dir=folder, per_device_train_batch_size=8 // replicas, per_device_eval_batch_size=8 // replicas,
                gradient_accumulation_steps=2, learning_rate=args.lr, max_grad_norm=1.0, num_train_epochs=2, logging_steps=1,
                save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=rows[:96], eval_dataset=rows[96:],
        )  # fmt: skip
        trainer.train()
        scores = trainer.evaluate()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line] + [scores["eval_loss"]]


if __name__ == "__main__":
    common.run(train, common.arguments(__doc__, "dp=2", lr=3e-3))
