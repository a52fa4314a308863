"""algorithm: ring attention of one rank, forward and backward, as generators that ask for transfers (see `drive`).

Without a window, or with one that reaches far, keys and values go round: each rank computes with those at hand while it passes
them on, and after as many rounds as there are ranks it has seen all. In the backward their gradients go round behind them, in
the same direction, and come home in the last round. With a window that reaches less far (`RingSchedule.halo`) each chunk gets the
keys before it that its window reaches, and returns their gradients.

Results for the several blocks of keys are merged by their log-sum-exp, and the backward of each block is told that over all keys
(autograd through the merge would need the gradient of a kernel's log-sum-exp, which kernels do not have).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxpar.ops.ring.blocks import Merged, attend, attend_backward
from fxpar.ops.ring.drive import Asking, RingTransfer
from fxpar.ops.ring.kernels import accumulates_in
from fxpar.ops.ring.packets import PacketLayout
from fxpar.ops.ring.schedule import ChunkPiece, RingSchedule
from fxpar.ops.ring.sight import Ids, Sight

Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Rank:
    """What one rank is told: its number; its parts of the tensors and of what limits sight."""

    rank: int
    schedule: RingSchedule
    q: Tensor
    k: Tensor
    v: Tensor
    ids: Ids
    scale: float

    @property
    def travelling(self) -> list[Tensor]:
        """Keys, values, and what of the ids belongs to them."""
        return [self.k, self.v, *(t for t in (self.ids.k, self.ids.valid) if t is not None)]

    @property
    def layout(self) -> PacketLayout:
        """Of the packets in which they travel."""
        tensors = self.travelling
        return PacketLayout.of(tensors, [2, 2, *[1] * (len(tensors) - 2)])

    def sight(self, rows: slice, keys: slice, shift: int | None, held: Sequence[Tensor]) -> Sight:
        """What queries `rows` see of the keys `keys` among those `held`, which travelled or are its own."""
        more = iter(held[2:])
        ids = self.ids.with_keys(*(None if t is None else next(more) for t in (self.ids.k, self.ids.valid)))
        return Sight(shift, None if shift is None else self.schedule.window, ids.of(rows, keys))


def forward(rank: Rank) -> Asking[tuple[Tensor, Tensor]]:
    """Returns out [b, h, lq, e], lse [b, h, lq]; both wide (see `accumulates_in`), 0 and -inf for queries that see no key."""
    merged = Merged(rank.q, rank.v)

    def add(rows: slice, keys: slice, shift: int | None, held: Sequence[Tensor]) -> None:
        sight = rank.sight(rows, keys, shift, held)
        merged.add(rows, *attend(rank.q[:, :, rows], held[0][:, :, keys], held[1][:, :, keys], sight, rank.scale))

    schedule = rank.schedule
    if schedule.halo:
        handle = yield _halo_asked(rank)
        for number in range(schedule.chunks):
            own = schedule.part(number)
            add(own, own, 0, rank.travelling)
        for own, held, _ in _halos(rank, (yield handle)):
            reaching = schedule.reaching()
            add(slice(own.start, own.start + reaching.stop), slice(None), held[0].shape[2], held)
        return merged.out, merged.lse
    held, packet = rank.travelling, None
    for step in range(schedule.ranks):
        handle = None
        if step < schedule.ranks - 1:
            packet = _packed(rank) if packet is None else packet
            handle = yield RingTransfer.onwards(packet, rank.rank, schedule.ranks)
        for pair in schedule.pairs(rank.rank, (rank.rank - step) % schedule.ranks):
            add(pair.rows, pair.keys, pair.shift, held)
        if handle is not None:
            packet = yield handle
            held = rank.layout.unpack(packet, schedule.keys)
    return merged.out, merged.lse


def backward(rank: Rank, grad: Tensor, out: Tensor, lse: Tensor) -> Asking[Grads]:
    """From the cotangent of out, out itself (both in the dtype of q) and lse: the gradients of the rank's q, k and v, wide."""
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    dq = _zeros(rank.q)

    def add(rows: slice, keys: slice, shift: int | None, held: Sequence[Tensor], dk: Tensor, dv: Tensor) -> None:
        sight = rank.sight(rows, keys, shift, held)
        attend_backward(grad[:, :, rows], rank.q[:, :, rows], held[0][:, :, keys], held[1][:, :, keys], out[:, :, rows],
                        lse[:, :, rows], sight, rank.scale, (dq[:, :, rows], dk[:, :, keys], dv[:, :, keys]))

    schedule = rank.schedule
    if schedule.halo:
        handle = yield _halo_asked(rank)
        dk, dv = _zeros(rank.k), _zeros(rank.v)
        for number in range(schedule.chunks):
            own = schedule.part(number)
            add(own, own, 0, rank.travelling, dk, dv)
        made: dict[ChunkPiece, list[Tensor]] = {}
        for own, held, pieces in _halos(rank, (yield handle)):
            reaching, grads = schedule.reaching(), [_zeros(held[0]), _zeros(held[1])]
            add(slice(own.start, own.start + reaching.stop), slice(None), held[0].shape[2], held, *grads)
            made.update({p: [g[:, :, p.at : p.at + p.length] for g in grads] for p in pieces})
        yield from _returned(rank, made, dk, dv)
        return dq, dk, dv
    layout = PacketLayout.of([_zeros(x, "meta") for x in (rank.k, rank.v)], [2, 2])
    held, packet, behind = rank.travelling, None, None
    for step in range(schedule.ranks):
        handle = None
        if step < schedule.ranks - 1:
            packet = _packed(rank) if packet is None else packet
            handle = yield RingTransfer.onwards(packet, rank.rank, schedule.ranks)
        sums = torch.zeros(layout.bytes(schedule.keys), dtype=torch.uint8, device=rank.q.device)
        dk, dv = layout.unpack(sums, schedule.keys)
        for pair in schedule.pairs(rank.rank, (rank.rank - step) % schedule.ranks):
            add(pair.rows, pair.keys, pair.shift, held, dk, dv)
        if behind is not None:  # what the ranks before found for these keys
            for mine, theirs in zip((dk, dv), layout.unpack((yield behind), schedule.keys), strict=True):
                mine += theirs
        if schedule.ranks > 1:
            behind = yield RingTransfer.onwards(sums, rank.rank, schedule.ranks)
        if handle is not None:
            packet = yield handle
            held = rank.layout.unpack(packet, schedule.keys)
    if behind is not None:
        dk, dv = layout.unpack((yield behind), schedule.keys)
    return dq, dk, dv


def _zeros(x: Tensor, device: str | None = None) -> Tensor:
    """Like it, wide; of heads, in memory, the innermost but one."""
    b, h, length, d = x.shape
    return torch.zeros(b, length, h, d, dtype=accumulates_in(x.dtype), device=device or x.device).transpose(1, 2)


def _packed(rank: Rank) -> Tensor:
    return rank.layout.pack(rank.travelling, [slice(0, rank.schedule.keys)])


def _halo_asked(rank: Rank) -> RingTransfer:
    """The transfer of what windows reach of other ranks' keys."""
    layout, schedule = rank.layout, rank.schedule
    sent = schedule.sent(rank.rank)
    payload = layout.pack(rank.travelling, [piece.positions for pieces in sent for piece in pieces])
    return RingTransfer(payload, *_splits(layout, schedule, rank.rank))


def _splits(layout: PacketLayout, schedule: RingSchedule, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes of a rank's pieces of halos that it sends to each rank, and that it receives."""
    received = schedule.received(rank)
    return (tuple(sum(layout.bytes(p.length) for p in pieces) for pieces in schedule.sent(rank)),
            tuple(sum(layout.bytes(p.length) for p in received if p.owner == other) for other in range(schedule.ranks)))


def _halos(rank: Rank, packets: Tensor) -> list[tuple[slice, list[Tensor], list[ChunkPiece]]]:
    """Of each of the rank's chunks that reaches back: its part of the rank's tensors, what it reaches, and in which pieces."""
    layout, schedule = rank.layout, rank.schedule
    arrived, start = {}, 0
    for piece in schedule.received(rank.rank):
        arrived[piece] = layout.unpack(packets, piece.length, start)
        start += layout.bytes(piece.length)
    found = []
    for number in range(schedule.chunks):
        pieces = sorted((p for p in schedule.pieces(rank.rank) if p.chunk == number), key=lambda p: p.at)
        parts = [arrived[p] if p in arrived else [t.narrow(dim, p.start, p.length)
                 for t, dim in zip(rank.travelling, layout.dims, strict=True)] for p in pieces]
        if parts:
            held = [torch.cat(tensors, dim) for tensors, dim in zip(zip(*parts, strict=True), layout.dims, strict=True)]
            found.append((schedule.part(number), held, pieces))
    return found


def _returned(rank: Rank, made: dict[ChunkPiece, list[Tensor]], dk: Tensor, dv: Tensor) -> Asking[None]:
    """Send gradients of halos to whom their keys belong, and add those that come to dk and dv."""
    schedule = rank.schedule
    layout = PacketLayout.of([dk, dv], [2, 2])
    for piece, (of_k, of_v) in made.items():
        if piece.owner == rank.rank:
            dk[:, :, piece.positions] += of_k
            dv[:, :, piece.positions] += of_v
    packets = [layout.pack(made[p], [slice(0, p.length)]) for p in schedule.received(rank.rank)]
    payload = torch.cat(packets) if packets else torch.empty(0, dtype=torch.uint8, device=dk.device)
    to, of = _splits(layout, schedule, rank.rank)
    arrived = yield (yield RingTransfer(payload, of, to))
    start = 0
    for piece in (p for pieces in schedule.sent(rank.rank) for p in pieces):
        of_k, of_v = layout.unpack(arrived, piece.length, start)
        dk[:, :, piece.positions] += of_k
        dv[:, :, piece.positions] += of_v
        start += layout.bytes(piece.length)
