"""What the examples share: arguments, processes, text to train on, and the comparison with one process."""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import sysconfig

import torch
import torch.distributed as dist

import fxpar

TOLERANCE = 1e-5  # relative, fp32
OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


def plan(text):
    try:
        return fxpar.Plan.parse(text)
    except ValueError as error:  # argparse shows the reason only of its own error
        raise argparse.ArgumentTypeError(str(error)) from None


def arguments(doc, default, **numbers):
    """The parser of an example. doc: its docstring. default: its plan. numbers: more arguments, with their defaults."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--plan", type=plan, default=plan(default), help=f"for example {default}")
    for name, value in numbers.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    parser.add_argument("--check", action="store_true", help="compare with one process that does without fxpar")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser


def run(train, parser):
    """Call `train(args)`, which returns its losses, on every rank. With --check one process of its own has called it before, with
    `args.alone`, to train the plain model; exits with an error if losses differ."""
    args = parser.parse_args()
    if args.alone:
        args.device = device_of_rank()
        print(json.dumps(train(args)))
        return
    args.device = start_processes()
    try:
        plain = of_one_process() if args.check and dist.get_rank() == 0 else []
        dist.barrier()
        losses = train(args)
    finally:
        dist.destroy_process_group()
    if plain and not compare(plain, losses):
        raise SystemExit(1)


def of_one_process():
    """The losses of this program in one process, which torchrun knows nothing of."""
    environment = {k: v for k, v in os.environ.items() if k not in OF_TORCHRUN and not k.startswith("TORCHELASTIC")}
    environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # Trainer takes all it sees
    command = [sys.executable, *sys.argv, "--alone"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def start_processes():
    """Joins the process group (of one, without torchrun); returns this rank's device."""
    device = device_of_rank()
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    backend, bound = ("gloo", None) if device.type == "cpu" else ("nccl", device)
    dist.init_process_group(backend, device_id=bound, **alone)
    return device


def device_of_rank():
    """A GPU by LOCAL_RANK, or the CPU. Convolutions compute in fp32 there, as products do: TF32 has three digits."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def say(*words):
    """Print on rank 0, or where there is but one process."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*words, flush=True)


def read_corpus(megabytes):
    """The first bytes of the standard library's sources, in sorted order, as one tensor of byte values."""
    text, limit = bytearray(), int(megabytes * 2**20)
    for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


def rows_of_text(count, length):
    """Rows for a language model of bytes: what a data set of tokens has. Of each, the first bytes are a prompt without labels."""
    rows = []
    for number, row in enumerate(read_corpus(count * length / 2**20 + 1)[: count * length].long().view(count, length)):
        labels = row.clone()
        labels[: number % (length // 2)] = -100
        rows.append(dict(input_ids=row, labels=labels))
    return rows


def tiny_llama():
    """Built anew, with the same weights each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=256, num_hidden_layers=2, hidden_size=64, intermediate_size=176, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, use_cache=False, bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip


def compare(plain, parallel):
    """Prints both runs' losses side by side; returns whether they are equal within the tolerance."""
    print(f"\n{'step':>4}  {'one process':>12}  {'parallel':>12}  {'difference':>10}")
    relative = [abs(a - b) / abs(a) for a, b in zip(plain, parallel)]
    for step, row in enumerate(zip(plain, parallel, relative), 1):
        print("{:>4}  {:12.7f}  {:12.7f}  {:10.1e}".format(step, *row))
    equal = all(difference <= TOLERANCE for difference in relative)  # false for NaN, too
    print("equal" if equal else f"NOT equal: the relative difference exceeds {TOLERANCE}", flush=True)
    return equal
