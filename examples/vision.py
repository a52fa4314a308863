"""Train a small vision transformer to tell stripes from each other, under any plan.

    torchrun --nproc-per-node=2 examples/vision.py --check
    torchrun --nproc-per-node=4 examples/vision.py --plan dp=2,tp=2 --check

NCCL where there are GPUs, gloo elsewhere. The images are made: stripes in four directions, shifted, with noise.
"""

import common
import torch
from transformers import ViTConfig, ViTForImageClassification

import fxpar

DIRECTIONS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7], [0.7, -0.7]])


def draw(count, seed):
    """Images of 16 by 16 pixels, and the direction of the stripes on each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    places = torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij"))
    along = (DIRECTIONS[labels][:, :, None, None] * places).sum(1)
    shifts = 6.28 * torch.rand(count, 1, 1, generator=generator)
    images = (along + shifts).sin() + 0.3 * torch.randn(count, 16, 16, generator=generator)
    return dict(pixel_values=images[:, None].expand(-1, 3, -1, -1).contiguous(), labels=labels)


def train(args):
    """The loss of every step."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(
        image_size=16, patch_size=4, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=4,
    )).to(args.device)  # fmt: skip
    part = slice(0, args.batch)
    if not args.alone:
        size = args.batch // args.plan.dp
        model = fxpar.parallelize(model, args.plan, draw(size, 0))
        part = slice(model.replica * size, (model.replica + 1) * size)

    def batch(seed):
        return {name: t[part].to(args.device) for name, t in draw(args.batch, seed).items()}

    opt = torch.optim.AdamW(model.parameters(), lr=args.lr)
    losses = []
    for step in range(args.steps):
        loss = model(**batch(step)).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
        common.say(f"step {step + 1}/{args.steps}  loss {losses[-1]:.4f}")

    unseen = batch(args.steps)
    with torch.no_grad():
        right = (model(**unseen).logits.argmax(-1) == unseen["labels"]).float().mean()
    common.say(f"of {len(unseen['labels'])} images that were not trained on, {right:.0%} are told right")
    return losses


if __name__ == "__main__":
    common.run(train, common.arguments(__doc__, "dp=2", lr=2e-3, steps=16, batch=32))
