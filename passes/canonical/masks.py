"""masks: attention masks that are constants become properties of the attention.

Traced models spell "causal" as a rows x columns tensor made from ranges, which nothing after this pass could
see through, shard or afford. Here every such mask is computed (see constants.py: exactly, and in memory
that grows with the length, not its square) and compared with the masks that attention can do without.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, fx

from fxpar import compat
from fxpar.ops.attention import takes, windowed_attention
from fxpar.ops.dropout_attention import refusal, uses_kernels
from fxpar.ops.vocabulary import SDPA
from fxpar.passes.canonical.bands import MaskValue, diagonals
from fxpar.passes.canonical.constants import evaluate, given, is_fill, is_function
from fxpar.passes.rewrite import remove_unread
from fxpar.program import Program, value_of

aten = torch.ops.aten

# Every key, the keys up to the query's own position, or only so many of them (the size of the window).
Verdict = Literal["all", "causal"] | int


def fold_masks(program: Program) -> Program:
    """Rewrite attention whose mask is constant and known; in place.

    Takes: a functional graph (if it has in-place operators, it is returned as it is).
    Afterwards: where the mask of a `scaled_dot_product_attention` is made of constants only, and

    - allows everything (or adds zero everywhere): there is no mask;
    - is causal, with as many queries as keys: there is none, and ``is_causal=True``;
    - is causal and no more than the last `window` keys, without dropout or where `use_kernels` holds: the call is one of
      `fxpar.ops.attention.windowed_attention`;

    where "allows" is True or adding zero, and its contrary False or adding the lowest number or less. Every
    other mask is kept, such as one that depends on an input, a parameter, a random number or memory that was
    never written, or that leaves a query without keys. A buffer counts as constant if the model does not
    update it; that its value was read is noted. Masks that nothing reads are gone, and views are reshapes.
    """
    if any(compat.mutates(n.target) for n in program.graph.nodes):
        return program
    constant = constants(program)
    verdicts: dict[tuple[fx.Node, int, int], Verdict | None] = {}
    for node in program.graph.nodes:
        mask = mask_of(node)
        if mask is None or mask not in constant:
            continue
        query, key, _ = _operands(node)
        rows, columns = value_of(query).shape[-2], value_of(key).shape[-2]
        case = (mask, rows, columns)
        if case not in verdicts:
            value = value_in(program, mask)
            verdicts[case] = None if value is None else verdict(value, rows, columns)
        if verdicts[case] is not None:
            _rewrite(program, node, mask, verdicts[case])
    for mask, *_ in verdicts:
        _drop_asserts(program, mask)
    _forget_strides(program.graph)
    remove_unread(program.graph)
    program.graph.lint()
    return program


def verdict(mask: MaskValue, rows: int, columns: int) -> Verdict | None:
    """Which keys a mask allows, if it is one of the masks that attention can do without."""
    allowed = allowed_by(mask, rows, columns)
    return None if allowed is None else verdict_of(allowed, rows, columns)


def allowed_by(mask: MaskValue, rows: int, columns: int) -> Tensor | None:
    """For each diagonal, or all of them, whether a constant mask allows it; None where it says anything else."""
    data = diagonals(mask, rows, columns)
    return None if data is None else _allowed(data)


def verdict_of(allowed: Tensor, rows: int, columns: int) -> Verdict | None:
    """The same of what `allowed_by` says."""
    if bool(allowed.all()):
        return "all"
    if rows != columns or not bool(allowed.any()):
        return None
    reach = torch.arange(1 - rows, columns)[allowed.expand(rows + columns - 1)]  # key minus query
    low, high = int(reach[0]), int(reach[-1])
    if high != 0 or high - low + 1 != len(reach):
        return None
    return "causal" if low == 1 - rows else 1 - low


def _allowed(data: Tensor) -> Tensor | None:
    """Where a boolean or an additive mask allows a key; None if it does anything but allow and forbid."""
    if data.dtype == torch.bool:
        return data
    if not data.is_floating_point():
        return None
    allowed = data == 0
    forbidden = data <= torch.finfo(data.dtype).min
    return allowed if bool((allowed | forbidden).all()) else None


# ---- the constants of a program ----


def constants(program: Program) -> set[fx.Node]:
    """The nodes that are a function of shapes, buffers and constants alone."""
    found: set[fx.Node] = set()
    updated = {s.name for s in program.sinks if s.kind == "buffer"}
    updated |= {program.tied[name] for name in updated if name in program.tied}
    for node, source in program.source_of().items():
        if source.kind == "constant" or (source.kind == "buffer" and source.name not in updated):
            found.add(node)
    for node in program.graph.nodes:
        if node.op == "call_function" and is_function(node.target):
            if is_fill(node.target) or all(n in found for n in node.all_input_nodes):
                found.add(node)
    return found


def _cone(mask: fx.Node) -> set[fx.Node]:
    """The nodes that the value of `mask` is made from (what a fill reads is not among them)."""
    cone: set[fx.Node] = set()
    pending = [mask]
    while pending:
        node = pending.pop()
        if node not in cone:
            cone.add(node)
            pending.extend(() if is_fill(node.target) else node.all_input_nodes)
    return cone


def value_in(program: Program, mask: fx.Node) -> MaskValue | None:
    cone = _cone(mask)
    sources = program.source_of()
    values: dict[fx.Node, MaskValue | None] = {}
    for node in program.graph.nodes:
        if node in cone:
            values[node] = given(sources[node].value) if node in sources else evaluate(node, values)
    return values[mask]


# ---- rewriting ----


def mask_of(node: fx.Node) -> fx.Node | None:
    """The mask of an attention that this pass can rewrite, if it has one."""
    if node.target is not SDPA:
        return None
    mask = _option(node, 3, "attn_mask")
    if not isinstance(mask, fx.Node) or _option(node, 5, "is_causal"):
        return None
    query, key, _ = _operands(node)
    out, shape = value_of(node).shape, value_of(query).shape
    if not all(isinstance(n, int) for n in (*out, *shape, *value_of(key).shape, *value_of(mask).shape)):
        return None
    return mask if out[:-1] == shape[:-1] else None  # otherwise the mask gives the result a batch of its own


def _operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """Query, key and value."""
    return tuple(n for n in node.args[:3] if isinstance(n, fx.Node))


def _option(node: fx.Node, at: int, name: str) -> Any:
    """An argument that may be given by position or by name; None where it has its default."""
    return node.args[at] if len(node.args) > at else node.kwargs.get(name)


def _rewrite(program: Program, node: fx.Node, mask: fx.Node, allowed: Verdict | None) -> None:
    operands, dropout = _operands(node), _option(node, 4, "dropout_p") or 0.0
    kwargs = {k: v for k, v in node.kwargs.items() if k in ("scale", "enable_gqa")}
    if isinstance(allowed, int):
        query, key, value = map(value_of, operands)
        grouped = bool(kwargs.get("enable_gqa"))
        if dropout and not uses_kernels():
            program.note("a sliding-window mask is kept: with dropout a window takes kernels that are turned off "
                         "(way out: fxpar.ops.dropout_attention.use_kernels())")  # fmt: skip
            return
        if dropout and refusal(query, key, value, None, grouped, dropout):
            return  # the pass dropout says why
        if not takes(query, key, value, enable_gqa=grouped):
            program.note("a sliding-window mask is kept: windowed attention has no broadcasting")
            return
        node.target, node.args = windowed_attention, operands
        kwargs["window"] = allowed
        kwargs.update({"dropout_p": dropout} if dropout else {})
    else:
        node.args = (*operands, None, dropout, allowed == "causal")
    node.kwargs = kwargs
    sources = program.source_of()
    for name in sorted(sources[n].name for n in _cone(mask) if n in sources):
        program.note(f"the attention mask in {name} was read when the model was captured")
        program.reads.buffers.add(name)


def _forget_strides(graph: fx.Graph) -> None:
    """Attention returns other strides without its mask, and a view that was possible may not be any more."""
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default


def _drop_asserts(program: Program, mask: fx.Node) -> None:
    """Remove checks of the dtype or device of what the mask is made of: they would keep it alive."""
    for node in _cone(mask):
        for user in list(node.users):
            if user.target is aten._assert_tensor_metadata.default:
                program.graph.erase_node(user)
