"""post: point-to-point messages between the ranks of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from fxpar.passes.strategies.stages import Message, Stage
from fxpar.pipeline.schedules import Action, Kind


class GroupPost:
    """See `fxpar.pipeline.execute.Post`: messages of one step over a process group, of which rank i is the pipeline's rank i.

    Sends and receives are only started where the schedule has them, so that they run beside computation.
    """

    def __init__(self, group: dist.ProcessGroup, stages: Mapping[int, Stage], device: torch.device):
        self.group, self.stages, self.device = group, stages, device
        self._sent: list[tuple[dist.Work | None, Tensor]] = []
        self._coming: dict[Action, list[tuple[dist.Work | None, Tensor]]] = {}

    def send(self, action: Action, to: int, values: list[Tensor]) -> None:
        for value in values:
            value = value.detach().contiguous()
            self._sent.append((dist.isend(_plain(value), group=self.group, group_dst=to), value))

    def receive(self, action: Action, of: int) -> None:
        self._coming[action] = []
        for message in self._messages(action):
            room = torch.empty(message.shape, dtype=message.dtype, device=self.device)
            self._coming[action].append((dist.irecv(_plain(room), group=self.group, group_src=of), room))

    def arrived(self, action: Action) -> list[Tensor]:
        return [_waited(work, room) for work, room in self._coming.pop(action)]

    def finish(self) -> None:
        """Wait until everything that was sent may be overwritten."""
        for work, value in self._sent:
            _waited(work, value)
        self._sent.clear()

    def _messages(self, action: Action) -> list[Message]:
        stage = self.stages[action.stage]
        return list(stage.receives) if action.kind is Kind.RECV_F else [m for m in stage.sends if m.requires_grad]


def _plain(t: Tensor) -> Tensor:
    """The same memory as a dtype that every backend sends."""
    return t.view(torch.uint8) if t.dtype == torch.bool else t


def _waited(work: dist.Work | None, value: Tensor) -> Tensor:
    if work is not None:
        work.wait()
    return value
