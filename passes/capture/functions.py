"""functions: custom `torch.autograd.Function`s and tensor hooks, with the backward that their authors wrote.

A trace follows values alone. Inside `recorded_functions` it also follows the backward of each Function, from marks that stand for
the gradients that will arrive; `expand_functions` makes ordinary operators of that. A backward that is linear in what arrives,
``g -> B g``, is the gradient of ``x -> B^T x``: the program computes the Function's value from detached inputs, and beside it
``B^T x``, which is there for its gradient alone (`fxpar.ops.surrogate.attach`). These are operators as any others: rules
split them, and autograd derives the collectives of their backward. B^T is the transpose that autograd derives of the traced
backward. What a backward sends whatever arrives (an auxiliary loss that is attached to an activation) is a gradient of its own
(`fxpar.ops.surrogate.fixed`).
"""

from __future__ import annotations

import contextlib
import operator
import traceback
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxpar import compat
from fxpar.errors import CaptureError
from fxpar.ops import surrogate
from fxpar.passes.canonical.constants import is_fill
from fxpar.passes.infer.rules.spec import bind
from fxpar.program import copy_provenance, is_library_file, made_from, user_line

aten = torch.ops.aten

LINEAR = {
    "alias", "as_strided", "broadcast_to", "chunk", "clone", "contiguous", "cumsum", "detach", "diagonal", "expand", "expand_as",
    "flatten", "flip", "gather", "index", "index_select", "lift_fresh_copy", "mean", "movedim", "mT", "narrow", "neg", "negative",
    "numpy_T", "permute", "repeat", "repeat_interleave", "reshape", "roll", "select", "slice", "split", "split_with_sizes",
    "squeeze", "sum", "swapaxes", "t", "tensor_split", "transpose", "tril", "triu", "type_as", "unbind", "unflatten", "unsqueeze",
    "view", "view_as", "_to_copy", "_unsafe_view", "to", "embedding_dense_backward",
}  # fmt: skip
"""Operators that are linear in their first operand, the others being given."""
BILINEAR = {"mul", "multiply", "mm", "bmm", "matmul", "mv", "dot", "outer", "einsum", "linear"}
"""Operators that are linear in each of their operands."""
SUMS = {"add", "sub", "subtract", "rsub", "cat", "stack", "concat", "where", "index_add", "scatter", "scatter_add", "index_put",
        "masked_fill", "masked_scatter", "constant_pad_nd", "select_scatter", "slice_scatter"}  # fmt: skip
"""Operators that are linear in all of their floating-point operands together, the others being given."""
ADDED = ("self", "other", "input", "value", "values", "src", "source", "tensors")
"""What these call the operands that they add."""

WAY_OUT = ("write the backward with products, sums and rearrangements of the gradient that arrives, write the model without it, "
           "or do this to the gradients of parameters, after the backward")


# ---- while tracing ----


@contextlib.contextmanager
def recorded_functions() -> Iterator[None]:
    """Inside, `apply` of every custom Function leaves its forward and its backward in the trace.

    Raises: `CaptureError` naming the class and the user's line where a Function does what cannot be traced; the line alone for
    `torch.autograd.backward`, which the backward of a checkpoint calls.
    """
    with compat.functions_applied_by(_apply), mock.patch.object(torch.autograd, "backward", _refuse_backward):
        yield


def _refuse_backward(*_: Any, **__: Any) -> None:
    raise CaptureError("torch.autograd.backward inside of the forward, or of a custom Function's backward", line_here(),
                       "write the derivative out, or have torch.utils.checkpoint or Plan(recompute=...) save memory")


class _Context(SimpleNamespace):
    """What a Function's forward and backward know as `ctx`."""

    saved_tensors: tuple = ()
    saved_for_forward: tuple = ()
    materialize_grads = True

    def __init__(self, cls: type, where: str, needs_input_grad: tuple[bool, ...]):
        super().__init__(needs_input_grad=needs_input_grad)
        self._cls, self._where = cls, where
        self._constant: set[int] = set()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Tensor | None) -> None:
        self.saved_for_forward = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self._constant.update(map(id, tensors))

    def mark_dirty(self, *tensors: Tensor) -> None:
        raise CaptureError(f"the autograd Function {self._cls.__qualname__}, which writes to its input", self._where,
                           "have it return a new tensor")

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize_grads = value


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """``cls.apply`` as the trace is to see it."""
    where = line_here()
    wants = tuple(isinstance(a, Tensor) and a.requires_grad for a in args)
    grad = torch.is_grad_enabled() and any(wants)
    ctx = _Context(cls, where, wants if grad else tuple(False for _ in wants))
    with torch.no_grad():
        given = [a.detach() if isinstance(a, Tensor) else a for a in args]
        if compat.has_setup_context(cls):
            made = cls.forward(*given, **kwargs)
            cls.setup_context(ctx, tuple(given), made)
        else:
            made = cls.forward(ctx, *given, **kwargs)
        outs = list(made) if isinstance(made, tuple | list) else [made]
        live = [i for i, o in enumerate(outs)
                if isinstance(o, Tensor) and o.is_floating_point() and id(o) not in ctx._constant]
        if not grad or not live:
            return made
        marks = {i: surrogate.cotangent(outs[i]) for i in live}
        arrives = [marks.get(i, torch.zeros_like(o) if isinstance(o, Tensor) and ctx.materialize_grads else None)
                   for i, o in enumerate(outs)]
        sent = cls.backward(ctx, *arrives)
        sent = list(sent) if isinstance(sent, tuple | list) else [sent]
        pairs = [(a, _as_sent(s, a)) for a, s, w in zip(args, sent, wants, strict=False) if w and s is not None]
    values = surrogate.function([outs[i] for i in live], [a for a, _ in pairs], list(marks.values()), [s for _, s in pairs],
                                cls.__qualname__, where)
    for i, value in zip(live, values, strict=True):
        outs[i] = value
    return type(made)(outs) if isinstance(made, tuple | list) else outs[0]


def _as_sent(gradient: Tensor, to: Tensor) -> Tensor:
    """A gradient as autograd takes it: of the shape and dtype of what it belongs to."""
    gradient = gradient if gradient.shape == to.shape else gradient.sum_to_size(to.shape)
    return gradient.to(to.dtype)


def record_hook(value: Tensor, function: Any) -> Tensor:
    """What ``value.register_hook(function)`` leaves in the trace: a mark, which has to be an output of it."""
    where, name = line_here(), getattr(function, "__qualname__", type(function).__qualname__)
    what = f"the tensor hook {name}"
    if value.grad_fn is None:
        raise CaptureError(f"{what} on a leaf, in a forward: every call would register it again", where,
                           "register it once, outside of forward")
    with torch.no_grad():
        mark = surrogate.cotangent(value)
        made = function(mark)
        if made is None:
            raise CaptureError(f"{what}, which returns nothing: what it does beside would be done while capturing, and never "
                               "again", where, "return the gradient as it is to be, or read gradients outside of the model")
        return surrogate.hook(value, mark, _as_sent(made, value), what, where)


def line_here() -> str:
    """The user's innermost line on the stack."""
    frames = [f for f in traceback.extract_stack() if not is_library_file(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""


# ---- afterwards ----


def expand_functions(gm: fx.GraphModule) -> None:
    """Replace the marks of `gm` by operators, in place.

    Takes: a functional graph with ``meta["val"]``. Afterwards: it has no mark; every value of a Function is a detached one to
    which the transpose of its backward is attached; so is every tensor with a hook, for all of its users.
    Raises: `CaptureError` naming the class or hook and the user's line, where a backward is not linear.
    """
    graph = gm.graph
    found = [n for n in graph.nodes if n.target in (surrogate.function, surrogate.hook)]
    for node in found:
        (_expand_function if node.target is surrogate.function else _expand_hook)(graph, node)
    if found:
        for node in [n for n in graph.nodes if n.target is surrogate.cotangent]:
            node.target = aten.zeros_like.default
        _sort(graph)
        graph.eliminate_dead_code()
        gm.recompile()


def _expand_function(graph: fx.Graph, node: fx.Node) -> None:
    args: Any = node.args
    values, inputs, marks, gradients, name, where = args
    with graph.inserting_before(node):
        made = _attached(_Spot(graph, node, f"the autograd Function {name}", where), values, inputs, marks, gradients)
    for user in list(node.users):
        index: Any = user.args[1]
        user.replace_all_uses_with(made[index])
        graph.erase_node(user)
    graph.erase_node(node)


def _expand_hook(graph: fx.Graph, node: fx.Node) -> None:
    """The first hook of a value is nearest to its users, as it is the first to see their gradient."""
    args: Any = node.args
    value, mark, gradient, name, where = args
    outs = made_from(*(n for n in graph.output_node().all_input_nodes if n is not node))
    skipped = (surrogate.hook, surrogate.cotangent, aten.detach.default)
    users = [u for u in value.users if (u.target not in skipped and u in outs) or u.op == "output"]
    with graph.inserting_before(node):
        (made,) = _attached(_Spot(graph, node, name, where), [value], [value], [mark], [gradient])
    for user in users:
        user.replace_input_with(value, made)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


class _Spot:
    """Where in a graph new operators go, and whose they are."""

    def __init__(self, graph: fx.Graph, node: fx.Node, what: str, where: str):
        self.graph, self.node, self.what, self.where = graph, node, what, where

    def call(self, target: Any, *args: Any) -> fx.Node:
        new = self.graph.call_function(target, args)
        copy_provenance(new, self.node)
        values = fx.map_arg(args, lambda n: n.meta["val"])
        mode = next(n.meta["val"].fake_mode for n in new.all_input_nodes)
        with mode:
            new.meta["val"] = target(*values)
        return new

    def refuse(self, why: str) -> CaptureError:
        return CaptureError(f"{self.what}: {why}", self.where, WAY_OUT)


def _attached(spot: _Spot, values: list, inputs: list, marks: list, gradients: list) -> list[fx.Node]:
    """The values, with the gradients."""
    made = [spot.call(aten.detach.default, v) for v in values]
    marks = [_without_detach(m) for m in marks]
    inside, steady = _dependent(spot, marks, gradients)
    pairs = list(zip(inputs, gradients, strict=True))
    moving = [(x, g) for x, g in pairs if g in inside]
    linear: list[fx.Node | None] = _transposed(spot, inside, marks, moving) if moving else [None] * len(values)
    always = [(x, g) for x, g in pairs if g in steady or (g not in inside and not _is_zeros(g))]
    if always and len(values) > 1:
        raise spot.refuse("it has several outputs, and its backward sends a gradient that does not depend on those that arrive")
    for x, g in always:
        at_zero = spot.call(aten.detach.default, g)
        term = spot.call(surrogate.fixed, spot.call(aten.sum.default, spot.call(aten.mul.Tensor, x, at_zero)))
        term = spot.call(aten.expand.default, spot.call(aten.to.dtype, term, values[0].meta["val"].dtype),
                         list(values[0].meta["val"].shape))
        linear[0] = term if linear[0] is None else spot.call(aten.add.Tensor, linear[0], term)
    return [v if x is None else spot.call(surrogate.attach, v, x) for v, x in zip(made, linear, strict=True)]


def _without_detach(node: fx.Node) -> fx.Node:
    while node.target is aten.detach.default:
        node = node.all_input_nodes[0]
    return node


def _dependent(spot: _Spot, marks: list[fx.Node], gradients: list[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes between `marks` and `gradients`, and those of them that are not zero where the marks are.

    Raises: for a node that is neither linear in them nor that and a constant.
    """
    inside, steady, needed = set(marks), set(), made_from(*gradients)
    for node in spot.graph.nodes:
        mine = [n for n in node.all_input_nodes if n in inside]
        mark = node.target in (surrogate.cotangent, surrogate.function, surrogate.hook)
        if node not in needed or not mine or is_fill(node.target) or mark:
            continue
        if not _is_linear(node, inside):
            raise spot.refuse(f"its backward is not linear in the gradient that arrives ({node.target})")
        inside.add(node)
        if any(n in steady for n in mine) or not _vanishes(node, inside):
            steady.add(node)
    return inside, steady


def _is_linear(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether the result is linear in those of the operands that are `inside`, but for a constant."""
    if node.target is operator.getitem:
        return True
    made = node.meta["val"] if isinstance(node.meta["val"], tuple | list) else [node.meta["val"]]
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten" or \
            not all(isinstance(v, Tensor) and v.is_floating_point() for v in made):
        return False
    name = node.target.overloadpacket.__name__
    first, rest = _nodes(node.args[:1]), _nodes((node.args[1:], node.kwargs))
    mine = [n for n in (*first, *rest) if n in inside]
    if name in LINEAR or name.endswith(("_backward", "_backward_data")):
        return not any(n in inside for n in rest)
    if name in ("div", "true_divide", "divide"):
        return not any(n in inside for n in rest) and "rounding_mode" not in node.kwargs
    return len(mine) == 1 if name in BILINEAR else name in SUMS and "reduce" not in str(node.target)


def _nodes(tree: Any) -> list[fx.Node]:
    return [n for n in pytree.tree_leaves(tree) if isinstance(n, fx.Node)]


def _vanishes(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether the result is zero where all operands that are `inside` are."""
    name = getattr(node.target, "overloadpacket", node.target).__name__
    if name == "linear":
        return len(node.args) < 3 or node.args[2] is None
    if name not in SUMS:
        return True
    added = [a for key, a in bind(node).items() if key in ADDED]
    return all(_is_zeros(a) or a in inside for a in pytree.tree_leaves(added))


def _is_zeros(value: Any) -> bool:
    if isinstance(value, fx.Node):
        filled = is_fill(value.target)
        return filled and ("zeros" in str(value.target) or ("full" in str(value.target) and bind(value)["fill_value"] == 0))
    return value is None or value == 0


def _transposed(spot: _Spot, inside: set[fx.Node], marks: list[fx.Node],
                moving: list[tuple[fx.Node, fx.Node]]) -> list[fx.Node | None]:
    """A value for each of the marks: what the inputs become by the transpose of the backward."""
    body = fx.Graph()
    nodes = [n for n in spot.graph.nodes if n in inside and n not in marks]
    given = list(dict.fromkeys([*marks, *(n for node in nodes for n in node.all_input_nodes if n not in inside)]))
    copies = {n: body.placeholder(n.name) for n in given}
    for node in nodes:
        copies[node] = body.node_copy(node, lambda n: copies[n])
        if node.target is aten.detach.default:
            copies[node].target = aten.alias.default
    body.output([copies[g] for _, g in moving])
    backward, count = fx.GraphModule(nn.Module(), body), len(moving)
    unknown = [given.index(m) for m in marks]

    def transpose(*tensors: Tensor) -> list[Tensor | None]:
        xs, consts = tensors[:count], list(tensors[count:])
        for i in unknown:
            consts[i] = consts[i].detach().requires_grad_()
        with torch.enable_grad():
            return list(torch.autograd.grad(backward(*consts), [consts[i] for i in unknown], xs, allow_unused=True))

    operands = [*(x for x, _ in moving), *given]
    traced = compat.trace(transpose, [n.meta["val"].detach() for n in operands])
    values = dict(zip([n for n in traced.graph.nodes if n.op == "placeholder"], operands, strict=True))
    for node in traced.graph.nodes:
        if node.op == "call_function":
            values[node] = spot.graph.node_copy(node, lambda n: values[n])
            copy_provenance(values[node], spot.node)
        elif node.op == "get_attr":
            raise spot.refuse(f"its backward needs a constant that fxpar does not find again ({node.target})")
    made = traced.graph.output_node().args[0]
    return [None if n is None else values[n] for n in made]


def _sort(graph: fx.Graph) -> None:
    """Put every node behind what it reads, in the order that they have otherwise.

    Raises: `CaptureError` where a hook reads what is made of the tensor that it is on.
    """
    done: set[fx.Node] = set()
    waiting = [n for n in graph.nodes if n.op != "output"]
    while waiting:
        ready, later = [], []
        for node in waiting:
            if all(n in done for n in node.all_input_nodes):
                done.add(node)
                ready.append(node)
            else:
                later.append(node)
        if not ready:
            raise CaptureError("a tensor hook that reads what is made of its tensor", user_line(later[0]) or None, WAY_OUT)
        for node in ready if later else ():
            later[0].prepend(node)
        waiting = later
