"""Rows go to the ranks of their experts, and come back: an all-to-all whose parts are as long as a router makes them.

    arrival = exchange_plan(experts, axes, count)      which rows go where; how many arrive is known from here on
    order, arrived, splits = arrival
    rows = to_experts(rows, axes, order, splits, experts)
    rows = to_tokens(rows, axes, order, splits, experts)

Of `count` experts, each rank along `axes` has as many, in order. Its own rows lie in the order of their experts [n]; those that
arrive are brought into it [m]: first by expert, then by the rank they come from. Rows of no expert go to the last rank, behind
all others. `to_experts` and `to_tokens` are inverse to each other, and each is the other's gradient.

To compilers the plan and the exchange are opaque operators, of which m is the one size that depends on values: every exchange
of a plan has the same. Without other ranks (see `Runtime.balanced`) m is n.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx

from fxpar import compat
from fxpar.ops.collectives import Collective, described_by
from fxpar.ops.experts import put_back, take_rows
from fxpar.ops.runtime import LONE, active
from fxpar.ops.vocabulary import WAIT
from fxpar.sharding.mesh import Axes

Arrival = tuple[Tensor, Tensor, Tensor]
"""order [m]: which of the rows, as they arrive, is in each place; experts [m]: of the rows in these places; splits [2, ranks], on
the host: how many rows go to each rank, and come from it."""

_library = torch.library.Library("fxpar", "FRAGMENT")  # operators exist as long as this does
_library.define("exchange_plan(Tensor experts, int count, str group, int ranks, bool balanced) -> (Tensor, Tensor, Tensor)")
_library.define("exchange_rows(Tensor rows, Tensor splits, Tensor tokens, Tensor arrived, bool back, str group) -> Tensor")
PLAN = torch.ops.fxpar.exchange_plan.default
"""experts [n], sorted -> an `Arrival`."""
ROWS = torch.ops.fxpar.exchange_rows.default
"""rows [n, ...] -> [m, ...], or `back`: started, and to be waited for by `wait_tensor`. tokens [n] and arrived [m] are there for
their sizes."""


def exchange_plan(experts: Tensor, axes: Axes, count: int) -> Arrival:
    """See the module's docstring. experts [n]: of this rank's rows, sorted."""
    run = active()
    order, arrived, splits = PLAN(experts, count, run.exchange_name(axes), run.size(axes), run.balanced)
    return order, arrived, splits


def to_experts(rows: Tensor, axes: Axes, order: Tensor, splits: Tensor, tokens: Tensor) -> Tensor:
    """rows [n, ...] -> [m, ...]; order, splits: of the plan, tokens [n]: what it was made from."""
    made: Tensor = _Exchange.apply(rows, splits, tokens, order, False, active().exchange_name(axes))
    return take_rows(made, order, 1)


def to_tokens(rows: Tensor, axes: Axes, order: Tensor, splits: Tensor, tokens: Tensor) -> Tensor:
    """The inverse."""
    made: Tensor = _Exchange.apply(put_back(rows, order), splits, tokens, order, True, active().exchange_name(axes))
    return made


class _Exchange(torch.autograd.Function):
    """Started, and waited for."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, splits: Tensor, tokens: Tensor, arrived: Tensor, back: bool, group: str) -> Tensor:
        ctx.save_for_backward(splits, tokens, arrived)
        ctx.back, ctx.group = back, group
        made: Tensor = WAIT(ROWS(rows, splits, tokens, arrived, back, group))
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Exchange.apply(grad, *ctx.saved_tensors, not ctx.back, ctx.group), *[None] * 5


EXCHANGES = (to_experts, to_tokens)
described_by(to_experts, lambda rows, axes, *_: Collective("to_experts", rows, axes))
described_by(to_tokens, lambda rows, axes, *_: Collective("to_tokens", rows, axes))


def exchanged_along(node: fx.Node) -> Axes | None:
    """The axes along which a node of a program exchanges rows, or plans to; None of another node."""
    if node.target not in (exchange_plan, *EXCHANGES):
        return None
    axes: Any = node.args[1]
    return axes


def counts_rows(graph: fx.Graph) -> bool:
    """Whether a program has values whose number of rows is known only when it runs."""
    return bool(graph.find_nodes(op="call_function", target=exchange_plan))


def counted(graph: fx.Graph) -> set[fx.Node]:
    """The values of a program whose number of rows is known only when it runs, and what is made of them before they go back."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target is exchange_plan or (node.target is not to_tokens and any(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


# ---- what one rank does ----


def leaving(experts: Tensor, count: int, ranks: int) -> Tensor:
    """experts [n], sorted -> [ranks, count / ranks + 1]: how many rows there are for each expert of each rank, and of none."""
    ends = torch.searchsorted(experts, torch.arange(count, dtype=experts.dtype, device=experts.device), right=True)
    each = count // ranks
    out = ends.new_zeros(ranks, each + 1)
    out[:, :each] = torch.diff(ends, prepend=ends.new_zeros(1)).view(ranks, each)
    out[-1, -1] = experts.shape[0] - ends[-1]
    return out


def arriving(counts: Tensor, rows: int, first: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """counts [ranks, experts + 1]: how many rows come from each rank for each expert here, of which the first has the number
    `first`; `rows` in all -> order and experts of an `Arrival`."""
    lengths = counts.T.reshape(-1)
    starts = (counts.reshape(-1).cumsum(0) - counts.reshape(-1)).reshape(counts.shape).T.reshape(-1)
    run = torch.repeat_interleave(torch.arange(lengths.shape[0], device=counts.device), lengths, output_size=rows)
    order = starts[run] + torch.arange(run.shape[0], device=counts.device) - (lengths.cumsum(0) - lengths)[run]
    return order, (first + run // counts.shape[0]).to(dtype)


@torch.library.impl(_library, "exchange_plan", "CompositeExplicitAutograd")
def _plan(experts: Tensor, count: int, group: str, ranks: int, balanced: bool) -> Arrival:
    mine = leaving(experts, count, ranks)
    if group == LONE:
        rank, theirs = 0, mine[:1].repeat(ranks, 1)
    else:
        found = compat.collective_group(group)
        if found.size() != ranks:
            raise ValueError(f"an exchange over {ranks} ranks in a group of {found.size()}")
        rank, theirs = found.rank(), torch.empty_like(mine)
        dist.all_to_all_single(theirs, mine, group=found)
    splits = torch.stack([mine.sum(1), theirs.sum(1)]).cpu()  # the one time that the host waits for the GPU
    return *arriving(theirs, sum(splits[1].tolist()), count // ranks * rank, experts.dtype), splits


@torch.library.impl(_library, "exchange_rows", "CompositeExplicitAutograd")
def _rows(rows: Tensor, splits: Tensor, tokens: Tensor, arrived: Tensor, back: bool, group: str) -> Tensor:
    sent, received = splits.tolist()
    if back:
        sent, received = received, sent
    if group == LONE:
        return rows.new_zeros(sum(received), *rows.shape[1:]) if back else torch.cat([rows[: sent[0]]] * len(sent))
    out = rows.new_empty(sum(received), *rows.shape[1:])
    work = dist.all_to_all_single(out, rows.contiguous(), received, sent, group=compat.collective_group(group), async_op=True)
    compat.register_work(out, work)
    return out


@torch.library.register_fake("fxpar::exchange_plan", lib=_library)
def _fake_plan(experts: Tensor, count: int, group: str, ranks: int, balanced: bool) -> Arrival:
    rows = experts.shape[0] if balanced else torch.library.get_ctx().new_dynamic_size()
    return (experts.new_empty(rows, dtype=torch.int64), experts.new_empty(rows),
            torch.empty(2, ranks, dtype=torch.int64, device=experts.device if experts.is_meta else "cpu"))


@torch.library.register_fake("fxpar::exchange_rows", lib=_library)
def _fake_rows(rows: Tensor, splits: Tensor, tokens: Tensor, arrived: Tensor, back: bool, group: str) -> Tensor:
    return rows.new_empty((tokens if back else arrived).shape[0], *rows.shape[1:])


