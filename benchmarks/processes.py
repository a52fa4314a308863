"""What the benchmarks share: how a rank begins, and how ranks are started for what they print."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time

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
    """The line of JSON that rank 0 of a script prints last, as a dict; {"error": why} without one, or after `limit` seconds.
    variables: more of the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"OMP_NUM_THREADS": "1", **os.environ, "NCCL_NVLS_ENABLE": "0", **variables, "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        ranks = [subprocess.Popen([sys.executable, script, *arguments], stdout=subprocess.DEVNULL if rank else out, stderr=errors,
                                  env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)]
        end = time.monotonic() + limit
        while time.monotonic() < end and any(r.poll() is None for r in ranks) and not any(r.returncode for r in ranks):
            time.sleep(0.1)
        late = all(not r.returncode for r in ranks) and any(r.poll() is None for r in ranks)
        for r in ranks:
            r.kill()
            r.wait()
        out.seek(0)
        errors.seek(0)
        lines = [line for line in out if line.startswith("{")]
        if lines:
            return json.loads(lines[-1])
        return {"error": f"no result in {limit} s" if late else errors.read()[-1500:]}
