"""Train adapters of peft in a frozen Llama under any plan, and load them with peft alone.

    torchrun --nproc-per-node=2 examples/lora.py --check
    torchrun --nproc-per-node=4 examples/lora.py --plan dp=2,tp=2 --check

NCCL where there are GPUs, gloo elsewhere. Needs peft: pip install 'fxpar[peft]'.
"""

import tempfile

import common
import peft
import torch
import torch.distributed as dist

import fxpar
from fxpar.integrations.peft import save_adapters


def train(args):
    """The loss of every step."""
    rows = common.rows_of_text(64, 64)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model, part = peft.get_peft_model(common.tiny_llama(), config).to(args.device), slice(0, 8)
    if not args.alone:
        model = fxpar.parallelize(model, args.plan)
        size = 8 // model.replica.count
        part = slice(model.replica * size, (model.replica + 1) * size)

    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    losses = []
    for step in range(args.steps):
        batch = torch.utils.data.default_collate([rows[(8 * step + i) % 64] for i in range(8)][part])
        loss = model(**{name: t.to(args.device) for name, t in batch.items()}).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
        common.say(f"step {step + 1}/{args.steps}  loss {losses[-1]:.4f}")
    if not args.alone:
        reload(model)
    return losses


def reload(model):
    """What peft makes of the adapters' file is what the module has."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    save_adapters(folder[0], model)
    with model.gathered(rank0_only=True, offload="cpu") as trained:
        if trained is not None:
            loaded = peft.PeftModel.from_pretrained(common.tiny_llama(), folder[0])
            want, got = (peft.get_peft_model_state_dict(m) for m in (trained, loaded))
            assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
            print(f"peft loads all {len(got)} tensors of the adapters")


if __name__ == "__main__":
    common.run(train, common.arguments(__doc__, "dp=2", lr=1e-2, steps=8))
