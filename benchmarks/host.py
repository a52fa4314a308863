"""Measures what the host does in a training step, without a GPU: one process plays rank 0 of two.

    python benchmarks/host.py                        forward, backward, clipping and optimizer of 16 small layers
    python benchmarks/host.py --kinds                and what it does in them, by kind, from a profile
    python benchmarks/host.py --transport nccl       by the operators of a process group instead of copies
    python benchmarks/host.py --recorded             what is left where forward and backward are played back (by nothing)
    python benchmarks/host.py --plan pp=2,microbatches=4 --recorded        the same of a step of a pipeline, all in its forward
    python benchmarks/host.py --recorded --capturable    and the optimizer, too

The model is so small that computing takes little, and communication is pretended: what would be copied from another GPU is copied
in this process, and kernels that go by tables of addresses are not run. So losses mean nothing here, and what CUDA's own calls
take is missing.
"""

import argparse
import itertools
import json
import statistics
import time

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

import fxpar
from fxpar.backends.inductor import buckets, prefetch
from fxpar.backends.transport import addresses, copies
from fxpar.backends.transport.control import LEAST, Control, digest
from fxpar.run import engine
from fxpar.run.agreement import NOTHING

PARTS = ("forward", "backward", "clip", "optimizer")


class TwoSlots:
    """The slots of two ranks in one process; nobody waits for anybody."""

    rank, size = 0, 2

    def __init__(self, nbytes):
        self.memory = torch.zeros(2, len([*copies.GATHERS, *copies.SCATTERS]), nbytes, dtype=torch.uint8)

    def of(self, rank, which):
        return self.memory[rank, which]

    def barrier(self):
        pass


class NoLaunch:
    """A kernel that is not run."""

    def __init__(self, kind, rows, dtypes):
        pass

    def __call__(self):
        pass


class Agreed:
    """A side channel over which the other rank always says the same; one of another kind, that it trains nothing."""

    def allreduce(self, tensors, options):
        pairs, nothing = tensors[0].view(-1, 2), digest(NOTHING)
        pairs[(pairs == LEAST).all(1)] = torch.tensor([nothing, -nothing])
        return self

    def wait(self):
        return True


class NoPlayback:
    def __call__(self):
        pass

    def forget(self):
        pass


class NoGraphs:
    """Records a code by running it once; what plays it back does nothing."""

    beside = None

    def __init__(self, device):
        self.device = device
        self._memory = []

    def another(self):
        return NoGraphs(self.device)

    def record(self, code, inputs):
        given = list(inputs)
        inputs.clear()
        made = list(code(given))
        self._memory.append(list(made))
        return made, NoPlayback()

    def timed(self, run):
        return run(), 1.0, lambda: 1.0

    def most(self):
        return 1

    def taken(self):
        return 1

    def size(self):
        return 2

    def alive(self):
        return 0

    def drawn(self):
        return 0

    def give_back(self):
        pass

    def occupied(self):
        return None


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plan", default="dp=2,zero=3,param_dtype=bf16,reduce_dtype=fp32,outputs=loss")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--transport", default="auto", choices=["auto", "nccl"])
    parser.add_argument("--blocks", default="auto", choices=["auto", "once", "flat"])
    parser.add_argument("--recorded", action="store_true", help="forward and backward are played back")
    parser.add_argument("--capturable", action="store_true", help="the optimizer is capturable: its step is played back, too")
    parser.add_argument("--kinds", action="store_true", help="profile steps, and tell by kind what the host does")
    return parser.parse_args()


def pretend():
    """Be rank 0 of two on one host whose GPUs see each other's memory. A bucket has one block, as in large models."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    copies.available = lambda device: True
    copies.on_gpu = lambda group, parameter=0, gradient=0: copies.CopyGroup(TwoSlots(2**22))
    addresses.Launch, addresses.table_at = NoLaunch, lambda columns, device: columns
    Control._shared = lambda self: Agreed()
    Control._exchange = lambda self, thing: [thing[0]] * self.world
    buckets.BLOCK_BYTES, prefetch.FIRST_BYTES, prefetch.SMALL_BYTES = 2**10, 2**14, 2**4


def build(args):
    torch.manual_seed(0)
    if args.recorded:
        engine.device_of = NoGraphs
    config = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=2 * args.hidden, num_hidden_layers=args.layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, max_position_embeddings=64, use_cache=False, tie_word_embeddings=False,
        attn_implementation="sdpa", bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    tokens = torch.randint(0, 256, (fxpar.Plan.parse(args.plan).microbatches, 16))
    batch = dict(input_ids=tokens, labels=tokens)
    module = fxpar.parallelize(LlamaForCausalLM(config).float().train(), args.plan, batch, backend="inductor", blocks=args.blocks,
                               transport=args.transport, check_batches=0, cuda_graphs=args.recorded)
    return module, batch, torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True,
                                                                                       capturable=args.capturable)


def step(module, batch, opt):
    """One training step; the seconds of its parts that a processor had: others may compute beside it."""
    times = [time.thread_time()]
    loss = module(**batch)
    loss = getattr(loss, "loss", loss)
    times.append(time.thread_time())
    loss.backward()
    times.append(time.thread_time())
    module.clip_grad_norm_(1.0)
    times.append(time.thread_time())
    opt.step()
    opt.zero_grad()
    times.append(time.thread_time())
    return [b - a for a, b in itertools.pairwise(times)]


def main():
    args = parse_args()
    torch.set_num_threads(1)
    pretend()
    trained = build(args)
    for _ in range(10):
        step(*trained)
    if args.recorded and not (told := trained[0].report().cuda_graphs).startswith("on"):
        raise SystemExit(told)
    seconds = list(zip(*(step(*trained) for _ in range(args.steps)), strict=True))
    print(json.dumps({f"{part}_ms": {"least": round(1e3 * min(each), 2), "median": round(1e3 * statistics.median(each), 2)}
                      for part, each in zip(PARTS, seconds, strict=True)}))
    if args.kinds:
        for _ in range(2):  # what runs with ranges is made in the first
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                for _ in range(5):
                    step(*trained)
        print(fxpar.host_time(profile, steps=5))


if __name__ == "__main__":
    main()
