"""What the benchmarks share: how a rank begins, and how ranks are started for what they print."""

import json
import os
import subprocess
import sys

import torch
import torch.distributed as dist


def start_processes(cuda=None):
    """Joins the process group (of one, without torchrun); returns this rank's device. cuda: whether on GPUs; None: if any."""
    cuda = torch.cuda.is_available() if cuda is None else cuda
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None, **alone)
    return device


def launched(processes, limit, script, *arguments, **variables):
    """The line of JSON that a script prints last under torchrun, as a dict; {"error": why} without one, or after `limit` seconds.
    variables: more of the environment."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", script, *arguments]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "NCCL_NVLS_ENABLE": "0", **variables}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"no result in {limit} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"error": done.stderr[-1500:]}
