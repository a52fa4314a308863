"""What test_gpu.py starts on every GPU: three training steps of a Llama, compared with one GPU, and a checkpoint.

    torchrun --nproc-per-node=2 tests/nccl_program.py tp=2 float32

In fp32 the first step must agree to 1e-6 (loss) and 1e-5 (each gradient). In bf16 rounding differs with the order of
sums, so the parallel gradients may be no farther from those in fp32 than 1.5 times what one GPU's in bf16 are; a plan with
`param_dtype` starts from weights in fp32.
"""

import copy
import os
import shutil
import sys
import tempfile

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import fxpar


def build(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=256, intermediate_size=640, num_hidden_layers=2, num_attention_heads=8,
                         num_key_value_heads=4, vocab_size=512, use_cache=False)  # fmt: skip
    return LlamaForCausalLM(config).train().to(dtype)


def step(model, batch):
    """The loss and the full gradients, by name."""
    if getattr(model, "plan", None) is not None and model.plan.microbatches > 1:
        loss = model.train_step(**batch)
    else:
        loss = model(**batch).loss
        loss.backward()
    full = {n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)().float() for n, p in model.named_parameters()}
    return loss.detach().float(), full


def parts(module, optimizer):
    """This rank's parts of the parameters and of the optimizer's state."""
    moments = [optimizer.state[p][key] for p in module.parameters() for key in ("exp_avg", "exp_avg_sq")]
    return [t.detach().to_local() for t in (*module.parameters(), *moments)]


def distance(a, b):
    """The norm of all differences together."""
    return torch.stack([(a[n] - b[n]).norm() for n in a]).norm()


def main(plan, dtype):
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    for _ in range(2):  # another module on the same process groups
        train(plan, dtype, device)
    if dist.get_rank() == 0:
        print(f"equal: {plan}, {dtype}")
    dist.destroy_process_group()


def train(plan, dtype, device):
    ids = torch.randint(0, 512, (4, 128), generator=torch.Generator().manual_seed(1)).to(device)
    whole = {"input_ids": ids, "labels": ids}
    single, exact = build(dtype).to(device), build(torch.float32).to(device)
    master = exact if plan.param_dtype else single
    rows = ids.chunk(plan.dp)[0]
    module = fxpar.parallelize(copy.deepcopy(master), plan, {"input_ids": rows, "labels": rows})
    rows = ids.chunk(plan.dp)[module.replica]
    mine = {"input_ids": rows, "labels": rows}
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True) for m in (single, module)]
    for index in range(3):
        loss, grads = step(single, whole)
        other, others = step(module, mine)
        if index == 0:
            compare(dtype, (loss, grads), (other, others), step(exact, whole))
        norms = torch.nn.utils.clip_grad_norm_(single.parameters(), 0.1), module.clip_grad_norm_(0.1)
        assert torch.allclose(norms[0].float(), norms[1].float(), rtol=1e-5 if dtype is torch.float32 else 2e-2), norms
        clipped = sum(p.grad.full_tensor().double().square().sum() for p in module.parameters()).sqrt()
        assert abs(clipped - 0.1) < 1e-3, clipped
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    saves(module, optimizers[1])


def saves(module, optimizer):
    """What was saved, in the background, is there again after it was lost."""
    where = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(where)
    handle = fxpar.save_checkpoint(f"{where[0]}/step", module, optimizer, asynchronous=True)
    kept = [t.clone() for t in parts(module, optimizer)]
    for t in parts(module, optimizer):
        t.zero_()
    handle.wait()
    fxpar.load_checkpoint(f"{where[0]}/step", module, optimizer)
    assert all(map(torch.equal, parts(module, optimizer), kept))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(where[0])


def compare(dtype, one, parallel, exact):
    (loss, grads), (other, others) = one, parallel
    if dtype is torch.float32:
        assert abs(other - loss) <= 1e-6 * loss, (other, loss)
        for name, grad in grads.items():
            assert (others[name] - grad).norm() <= 1e-5 * grad.norm(), name
    else:
        assert abs(other - exact[0]) <= 1e-2 * exact[0], (other, exact[0])
        assert distance(others, exact[1]) <= 1.5 * distance(grads, exact[1])


if __name__ == "__main__":
    main(fxpar.Plan.parse(sys.argv[1]), getattr(torch, sys.argv[2]))
