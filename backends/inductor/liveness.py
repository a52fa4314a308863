"""liveness: which buffers a graph takes when Inductor runs it, and how long each of them lives.

Takes a graph as Inductor is about to lower it (after its graph passes and ours), with shapes in ``meta["val"]``; runs nothing.
`kernels` does what Inductor's lowering and scheduler do to memory: a pointwise value is computed inside of whoever uses
it, and gets a buffer only where something has to find it in memory; kernels over the same elements are fused, and what only
they use is never stored. `timeline` then says what is held while each kernel runs. Followed, in torch/_inductor:
``GraphLowering.run_node`` and ``StorageBox`` (who gets a buffer), ``Scheduler.fuse_nodes`` and
``topological_sort_schedule`` (fusion, order), ``decide_inplace_update`` and ``can_match_buffer_size`` (reuse).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxpar import compat
from fxpar.ops.dropout_attention import attend_backward
from fxpar.ops.exchange import ROWS
from fxpar.ops.parts import GATHER_PARTS, NEXT_PART
from fxpar.ops.ring import chunks
from fxpar.ops.ring import costs as ring
from fxpar.ops.vocabulary import WAITS, is_attention_kernel, is_view

MANY_READS, TOO_MANY_READS, MANY_OPERATORS, TOO_MANY_OPERATORS = 4, 8, 30, 100
"""Inductor's thresholds. A value is stored that reads more buffers, or is made by more operators; "many" for one with several
users (and, of operators, for one that reads several buffers), "too many" for every one."""

VIEWS = {"reshape", "_unsafe_view", "split", "split_with_sizes", "unbind", "chunk", "view_of", "expand_as"}
STRAIGHT = {"view", "reshape", "_unsafe_view", "squeeze", "unsqueeze", "alias", "detach", "view_of"}
"""Views (beside those whose operator says so), and those in which elements keep their order."""
REDUCTIONS = {"sum", "mean", "amax", "amin", "prod", "any", "all", "argmax", "argmin", "var", "var_mean", "std", "max", "min",
              "cumsum", "cumprod", "logcumsumexp", "xor_sum", "prepare_softmax_online"}  # fmt: skip
SCATTERS = {"index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate", "scatter", "scatter_add",
            "scatter_reduce"}  # fmt: skip
COMPUTED = {"convert_element_type", "_to_copy", "embedding", "gather", "index", "index_select", "_unsafe_index",
            "_unsafe_masked_index", "cat", "constant_pad_nd", "slice_scatter", "select_scatter", "clone", "iota", "arange",
            "full", "full_like", "new_full", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "empty", "empty_like",
            "scalar_tensor", "where", "masked_fill", "flip", "repeat", "roll", "triu", "tril", "fma", "device_put", "copy",
            "inductor_random", "inductor_lookup_seed", "inductor_seeds", "lift_fresh_copy", "upsample_nearest2d",
            "upsample_bilinear2d", "avg_pool2d", "avg_pool2d_backward", "_low_memory_max_pool_with_offsets",
            "_low_memory_max_pool_offsets_to_indices", "reflection_pad2d", "im2col", "glu", "rev"}  # fmt: skip
"""What Inductor generates code for, beside the operators that PyTorch tags as pointwise."""


@dataclass(eq=False)
class Buffer:
    """Memory for one value.

    node: who made it. dtype, bytes: as the allocator rounds them. freed: whether it is given back after its last use (not so:
    parameters and inputs). reusable: whether an operator may write its result there when it is used last.
    """

    node: fx.Node
    dtype: torch.dtype
    bytes: int
    freed: bool = True
    reusable: bool = True


@dataclass(eq=False)
class Kernel:
    """What runs as one: the operators, what they read (and whether each element is read where the result's is written), what
    they write, and whom they wait for.

    over: (elements of the result, elements reduced to one) of what may be fused; None for what may not.
    workspace: bytes held while it runs.
    """

    nodes: list[fx.Node]
    reads: dict[Buffer, bool]
    writes: list[Buffer]
    after: set[int]
    over: tuple[int, int] | None = None
    workspace: int = 0


@dataclass(eq=False)
class _Storage:
    """What a value and its views share: a buffer, or an expression over buffers that has none yet."""

    node: fx.Node
    reads: dict[Buffer, bool]
    operators: set[fx.Node] = field(default_factory=set)
    buffer: Buffer | None = None
    over: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class _Located:
    """A tensor: where its elements are, whether in their order, and what must live until it has arrived (a collective's
    operand)."""

    storage: _Storage
    straight: bool = True
    sent: Buffer | None = None


def size_of(value: torch.Tensor) -> int:
    """Bytes that the CUDA caching allocator hands out for a tensor's elements."""
    return -(-value.nbytes // 512) * 512


class Lowering:
    """The kernels of a graph, in the order in which Inductor runs them.

    given: the buffers of the placeholders. Afterwards: `kernels`, and `outputs`, the buffers that the graph returns (None for
    what is no tensor).
    """

    def __init__(self, graph: fx.Graph, given: list[Buffer | None]):
        self.values: dict[fx.Node, Any] = {}
        self.steps: list[Kernel] = []
        self.writer: dict[Buffer, int] = {}
        self.readers: dict[Buffer, list[int]] = {}
        feed = iter(given)
        for node in graph.nodes:
            if node.op == "placeholder":
                buffer = next(feed)
                if buffer is not None:
                    self.values[node] = _Located(_Storage(node, {buffer: True}, buffer=buffer))
            elif node.op == "call_function":
                self.values[node] = self._lower(node)
        leaves: Any = graph.output_node().args[0]
        self.outputs = [self._stored(n) if isinstance(n, fx.Node) else None for n in leaves]
        self.kernels = _ordered(_fused(self.steps, {b for b in self.outputs if b is not None}))

    # ---- one operator ----

    def _lower(self, node: fx.Node) -> Any:
        name = _name(node)
        if name == "getitem":
            made, index = self.values[node.all_input_nodes[0]], node.args[1]
            return made[index]
        if node.target in WAITS:
            return self._wait(node)
        if _is_view(node, name):
            return self._view(node, name)
        if compat.mutates(node.target):
            return self._write(node)
        return self._computed(node, name) if _is_generated(node, name) else self._called(node)

    def _operands(self, node: fx.Node) -> list[_Located]:
        return [v for n in node.all_input_nodes if isinstance(v := self.values.get(n), _Located)]

    def _view(self, node: fx.Node, name: str) -> Any:
        base = self.values.get(node.all_input_nodes[0])
        value = node.meta.get("val")
        if not isinstance(base, _Located):
            return base
        if not isinstance(value, torch.Tensor):
            return [_Located(base.storage, False, base.sent) for _ in value]
        same = name in STRAIGHT and value.numel() == node.all_input_nodes[0].meta["val"].numel()
        return _Located(base.storage, base.straight and same, base.sent)

    def _computed(self, node: fx.Node, name: str) -> Any:
        value = node.meta["val"]
        first = value if isinstance(value, torch.Tensor) else value[0]
        storage = _Storage(node, {}, {node}, over=(first.numel(), 1))
        for operand in node.all_input_nodes:
            made = self.values.get(operand)
            if not isinstance(made, _Located):
                continue
            numel = operand.meta["val"].numel()
            if name in REDUCTIONS:
                storage.over = (first.numel(), max(storage.over[1], numel // max(first.numel(), 1)))
            straight = name not in REDUCTIONS and name != "cat" and numel == first.numel()
            for buffer, there in made.storage.reads.items():
                straight_there = straight and there and made.straight
                storage.reads[buffer] = storage.reads.get(buffer, True) and straight_there
            if made.storage.buffer is None:
                storage.operators |= made.storage.operators
        if not isinstance(value, torch.Tensor):
            parts = [_Storage(node, dict(storage.reads), over=storage.over) for _ in value]
            self._store(parts, list(value))
            return [_Located(p) for p in parts]
        if name in REDUCTIONS or name in SCATTERS or self._is_stored_at_once(node, storage):
            self._store([storage], [value])
        return _Located(storage)

    def _is_stored_at_once(self, node: fx.Node, storage: _Storage) -> bool:
        reads = len(storage.reads)
        operators = len(storage.operators) + reads
        if operators > TOO_MANY_OPERATORS or (reads > 1 and (reads > TOO_MANY_READS or operators > MANY_OPERATORS)):
            return True
        if len(node.users) < 2:
            return False
        wanted = reads > 1 and any(_has_own_kernel(u) for u in node.users)
        return wanted or operators > MANY_OPERATORS or reads > MANY_READS or any(u.op == "output" for u in node.users)

    def _called(self, node: fx.Node) -> Any:
        """An operator with a kernel of its own, a collective among them."""
        operands = [self._find(v) for v in self._operands(node)]
        leaves, spec = pytree.tree_flatten(node.meta.get("val"))
        tensors = [v for v in leaves if isinstance(v, torch.Tensor)]
        storages = [_Storage(node, {}) for _ in tensors]
        self._add(node, dict.fromkeys(operands, False), self._allocate(storages, tensors), workspace=_workspace(node))
        sent = iter(operands if _is_collective(node) else ())
        made = iter([_Located(s, sent=next(sent, None)) for s in storages])
        return pytree.tree_unflatten([next(made) if isinstance(v, torch.Tensor) else None for v in leaves], spec)

    def _write(self, node: fx.Node) -> Any:
        """An operator that writes its result to its first operand (or, of a list, to each)."""
        first: Any = node.args[0]
        target = [self.values[n] for n in first] if isinstance(first, (list, tuple)) else self.values[first]
        operands = [self._find(v) for v in self._operands(node)]
        step = self._add(node, dict.fromkeys(operands, False), [])
        for value in target if isinstance(target, list) else [target]:
            buffer = self._find(value)
            self.steps[step].after |= set(self.readers.get(buffer, ())) - {step}
            self.writer[buffer] = step
        return target

    def _wait(self, node: fx.Node) -> _Located:
        value = self.values[node.all_input_nodes[0]]
        buffer = self._find(value)
        step = self._add(node, dict.fromkeys([buffer] if value.sent is None else [buffer, value.sent], False), [])
        self.writer[buffer] = step
        return _Located(value.storage, value.straight, value.sent if node.target is NEXT_PART else None)

    # ---- buffers ----

    def _stored(self, node: fx.Node) -> Buffer | None:
        value = self.values.get(node)
        return self._find(value) if isinstance(value, _Located) else None

    def _find(self, value: _Located) -> Buffer:
        """The buffer of a value; it gets one now if it has none."""
        storage = value.storage
        if storage.buffer is None:
            self._store([storage], [storage.node.meta["val"]])
        assert storage.buffer is not None
        return storage.buffer

    def _store(self, storages: list[_Storage], values: list[torch.Tensor]) -> None:
        first = storages[0]
        reads = dict(first.reads)
        self._add(first.node, reads, self._allocate(storages, values), first.over)

    def _allocate(self, storages: list[_Storage], values: list[torch.Tensor]) -> list[Buffer]:
        out = []
        for storage, value in zip(storages, values, strict=True):
            storage.buffer = Buffer(storage.node, value.dtype, size_of(value))
            storage.reads = {storage.buffer: True}
            out.append(storage.buffer)
        return out

    def _add(self, node: fx.Node, reads: dict[Buffer, bool], writes: list[Buffer], over: tuple[int, int] | None = None,
             workspace: int = 0) -> int:
        step = len(self.steps)
        after = {self.writer[b] for b in reads if b in self.writer}
        self.steps.append(Kernel([node], reads, writes, after, over, workspace))
        for b in reads:
            self.readers.setdefault(b, []).append(step)
        for b in writes:
            self.writer[b] = step
        return step


def _name(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(node.target, "__name__", "")


def _is_view(node: fx.Node, name: str) -> bool:
    return name in VIEWS or is_view(node)


def _is_generated(node: fx.Node, name: str) -> bool:
    """Whether Inductor generates code for the operator."""
    return name in SCATTERS or name in REDUCTIONS or name in COMPUTED or compat.is_pointwise(node.target)


def _has_own_kernel(node: fx.Node) -> bool:
    name = _name(node)
    return node.op == "call_function" and not _is_generated(node, name) and not _is_view(node, name)


def _is_collective(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "_c10d_functional" or node.target in (ROWS, GATHER_PARTS)


def _workspace(node: fx.Node) -> int:
    """The backward of attention sums the queries' gradient in fp32; with dropout it has a number for each query; ring attention
    has blocks that travel, and sums."""
    for of in (ring, chunks):
        if node.target in of.OPERATORS:
            return of.workspace_of(node)
    if not is_attention_kernel(_name(node)) or "backward" not in _name(node):
        return 0
    of_q = node.meta["val"][0]
    return (of_q[..., 0] if node.target is attend_backward else of_q).numel() * 4


# ---- fusion and order ----


def _fused(steps: list[Kernel], returned: set[Buffer]) -> list[Kernel]:
    """The steps with producers and consumers over the same elements joined, and what only one kernel uses not written."""
    home = list(range(len(steps)))
    before: list[int] = []  # per step, as bits: the kernels that its kernel comes after
    made_by = {b: i for i, step in enumerate(steps) for b in step.writes}
    for i, step in enumerate(steps):
        needs = {home[j] for j in step.after}
        before.append(_bits(needs, before))
        if step.over is None:
            continue
        for k in sorted({home[made_by[b]] for b in step.reads if b in made_by}, reverse=True):
            others = needs - {k}
            over = _together(steps[k].over, step.over)
            if over is None or any(before[q] >> k & 1 for q in others):
                continue
            _join(steps, home, before, i, k, over)
            break
    kernels = {i: step for i, step in enumerate(steps) if home[i] == i}
    number = {i: n for n, i in enumerate(kernels)}
    used: dict[Buffer, set[int]] = {}
    for i, kernel in kernels.items():
        for b in kernel.reads:
            used.setdefault(b, set()).add(i)
    for i, kernel in kernels.items():
        inside = {b for b in kernel.writes if used.get(b) == {i} and b not in returned}
        kernel.writes = [b for b in kernel.writes if b not in inside]
        kernel.reads = {b: there for b, there in kernel.reads.items() if made_by.get(b) is None or home[made_by[b]] != i}
        kernel.after = {number[home[j]] for j in kernel.after if home[j] != i}
    return list(kernels.values())


def _bits(needs: set[int], before: list[int]) -> int:
    out = 0
    for j in needs:
        out |= before[j] | 1 << j
    return out


def _together(a: tuple[int, int] | None, b: tuple[int, int]) -> tuple[int, int] | None:
    """What two kernels range over if they are one: the same, or one of them over all elements that the other reduces, or
    over its results."""
    if a is None:
        return None
    if a == b:
        return a
    for wide, flat in ((a, b), (b, a)):
        if flat[1] == 1 and wide[1] > 1 and flat[0] in (wide[0] * wide[1], wide[0]):
            return wide
    return None


def _join(steps: list[Kernel], home: list[int], before: list[int], i: int, k: int, over: tuple[int, int]) -> None:
    """Step `i` becomes part of kernel `k`, and so do the kernels that must come before it come before `k`."""
    kernel, step = steps[k], steps[i]
    home[i] = k
    kernel.over = over
    kernel.nodes += step.nodes
    kernel.writes = kernel.writes + step.writes
    kernel.after = kernel.after | step.after
    for b, there in step.reads.items():
        kernel.reads[b] = kernel.reads.get(b, True) and there
    new = before[i] & ~(1 << k) & ~before[k]
    if new:
        for j in range(len(before)):
            if j == k or before[j] >> k & 1:
                before[j] |= new


def _ordered(kernels: list[Kernel]) -> list[Kernel]:
    """Each kernel where the first of its operators was, what it needs right before it."""
    done: set[int] = set()
    order: list[int] = []
    for i in range(len(kernels)):
        stack = [i]
        while stack:
            top = stack[-1]
            missing = sorted((j for j in kernels[top].after if j not in done), reverse=True)
            if top not in done and missing:
                stack += missing
                continue
            stack.pop()
            if top not in done:
                done.add(top)
                order.append(top)
    return [kernels[i] for i in order]


# ---- time ----


def timeline(lowering: Lowering, resident: list[Buffer]) -> Iterator[tuple[Kernel, dict[Buffer, None]]]:
    """Every kernel, with the buffers that are held while it runs (the dict is the same object each time).

    resident: what is there at the beginning. At the end, what the graph returns and what is never freed is left.
    """
    kernels = lowering.kernels
    last: dict[Buffer, int] = {}
    for i, kernel in enumerate(kernels):
        last.update(dict.fromkeys([*kernel.writes, *kernel.reads], i))
    kept = {b for b in lowering.outputs if b is not None}
    live = dict.fromkeys(resident)
    for b in resident:
        if b not in last and b.freed and b not in kept:
            del live[b]
    for i, kernel in enumerate(kernels):
        dying = {b for b in [*kernel.reads, *kernel.writes] if last[b] == i and b.freed and b not in kept}
        for made in kernel.writes:
            source = _reused(kernel, made, dying) if kernel.over is not None else None
            if source is not None:
                dying.remove(source)
                live.pop(source, None)
            live[made] = None
        yield kernel, live
        for b in dying:
            live.pop(b, None)


def _reused(kernel: Kernel, made: Buffer, dying: set[Buffer]) -> Buffer | None:
    """A buffer that is read for the last time, element by element where `made` is written: the result goes there."""
    for b, there in kernel.reads.items():
        if there and b in dying and b.reusable and b.dtype == made.dtype and 0.95 * b.bytes <= made.bytes <= b.bytes:
            return b
    return None
