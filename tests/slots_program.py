"""What test_compat.py starts on every GPU: `CopyGroup` on symmetric memory, compared with NCCL, many times over.

    torchrun --nproc-per-node=2 tests/slots_program.py
"""

import os

import torch
import torch.distributed as dist

from fxpar import compat
from fxpar.backends.transport.copies import GATHERS, SCATTERS, CopyGroup

c10d = torch.ops._c10d_functional


def main():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    n, nccl = dist.get_world_size(), dist.group.WORLD.group_name
    slots = compat.SymmetricSlots(dist.group.WORLD, [2**20] * len([*GATHERS, *SCATTERS]), device)
    group = CopyGroup(slots, torch.cuda.Stream(priority=-1))
    compat.register_group(group, "copies")
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    for turn in range(50):
        sizes = [3 + turn, 70_000, 400_000 + turn]
        parts = [torch.randn(size, device=device, generator=generator).bfloat16() for size in sizes]
        sums = [torch.randn(n * size, device=device, generator=generator) for size in sizes]
        mine, theirs = (([c10d.wait_tensor(t) for t in c10d.all_gather_into_tensor_coalesced(parts, n, name)],
                         [c10d.wait_tensor(t) for t in c10d.reduce_scatter_tensor_coalesced(sums, "sum", n, name)])
                        for name in ("copies", nccl))
        assert all(torch.equal(a, b) for a, b in zip(mine[0], theirs[0], strict=True)), turn
        for a, b in zip(mine[1], theirs[1], strict=True):
            torch.testing.assert_close(a, b)
    if dist.get_rank() == 0:
        print("equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
