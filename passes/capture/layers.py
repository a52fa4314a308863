"""layers: of layers that are equal, one is traced for all.

Inside `traced_once` a member of a list of modules whose like was traced before leaves one mark in the trace, and `expand_layers`
puts in its place what the like computes, of this layer's own inputs, parameters and buffers. So a trace takes as long as the
model has different layers.

Two layers are equal if this can be proved: equal are their trees of modules with classes, hooks and modes, their inputs but for
the values of tensors, PyTorch's settings, and all that the code of the first one looked at (see `Evidence`); and the first one
wrote to nothing that was there before it: no attribute, global value, buffer, tensor, or list that it was given. Whatever else
happens in a layer has it traced.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxpar import compat
from fxpar.model.containers import know
from fxpar.model.reads import SIMPLE, Reads
from fxpar.ops import layers as marks
from fxpar.passes.capture.attributes import Recorded
from fxpar.passes.capture.evidence import Evidence, View
from fxpar.passes.capture.traced import TraceGuard

MISSES = 4
"""So many members of a group are looked at for nothing; then the others are traced as they are."""


@dataclass
class _LayerGroup:
    """Members of lists of modules whose trees of classes are equal; `calls` that were seen of them, and `classes`."""

    members: int = 0
    calls: int = 0
    misses: int = 0
    classes: list[_TracedLayer] = field(default_factory=list)


@dataclass
class _LayerCall:
    """A call of a layer. rest: of its inputs, those that are no tensors; given: the tensors, then the layer's own; key: what
    else has to be equal."""

    view: View
    spec: pytree.TreeSpec
    leaves: list[Any]
    rest: list[Any]
    given: list[Tensor]
    key: Hashable
    hooks: list[Any]


@dataclass
class _TracedLayer:
    """A layer that was traced. made: the tensors that it returned and did not get; leaves: what it returned, with a place in
    `made` or among the inputs for each tensor."""

    number: int
    call: _LayerCall
    evidence: Evidence
    made: list[Tensor]
    leaves: list[Any]
    spec: pytree.TreeSpec

    def is_like(self, call: _LayerCall) -> bool:
        """Whether a call of another layer would be traced as this one was."""
        mine = self.call
        return mine.key == call.key and mine.hooks == call.hooks and mine.rest == call.rest and self.evidence.holds(call.view)


@dataclass(frozen=True)
class _TensorPlace:
    made: bool
    index: int


class _Layers:
    def __init__(self, model: nn.Module, traced: TraceGuard, reads: Reads, record: Recorded):
        self.model, self.traced, self.reads, self.record = model, traced, reads, record
        self.count, self.inside = 0, False
        self.owners: Counter[int] | None = None

    def run(self, group: _LayerGroup, layer: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        group.calls += 1
        few = max(group.members, group.calls) < 2 or group.misses == MISSES
        if self.inside or few or sys.getprofile() is not None:
            return forward(*args, **kwargs)
        with compat.untraced():
            call = self._call(layer, args, kwargs)
            known = next((c for c in group.classes if call is not None and c.is_like(call)), None)
        if call is None:
            return forward(*args, **kwargs)
        if known is not None:
            known.evidence.share(self.reads, call.view)
            return self._again(known, call)
        self.inside = True
        try:
            return self._trace(group, call, forward, args, kwargs)
        finally:
            self.inside = False

    def _call(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> _LayerCall | None:
        """None if there is an input of which it is not known what it is, or a tensor of unknown shape or known values."""
        know((args, kwargs))
        view = View(layer)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        given = [x for x in leaves if isinstance(x, Tensor)] + view.tensors
        facts = [compat.trace_facts(t) for t in given]
        if not given or any(f is None for f in facts):
            return None
        first: dict[int, int] = {}
        places = [first.setdefault(id(t), i) for i, t in enumerate(given)]
        outside = tuple(id(t) if self._is_shared(t, view) else None for t in given)
        rest = [None if isinstance(x, Tensor) else view.describe(x) for x in leaves]
        hooks = [view.describe(list(table.values())) for m in view.modules[1:] for table in compat.hooks(m)]
        key = (view.tree, view.names, tuple(isinstance(x, Tensor) for x in leaves), str(spec), tuple(facts), tuple(places),
               outside, compat.trace_modes())
        return _LayerCall(view, spec, leaves, rest, given, key, hooks)

    def _is_shared(self, t: Tensor, view: View) -> bool:
        """Whether the model has a tensor elsewhere than in this layer, too."""
        if self.owners is None:
            self.owners = Counter(id(p) for m in self.model.modules() for table in (m._parameters, m._buffers)
                                  for p in table.values())
        return self.owners[id(t)] != sum(p is t for p in view.tensors)

    def _trace(self, group: _LayerGroup, call: _LayerCall, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        number, count = self.count, len(self.traced.marks)
        self.count += 1
        with compat.untraced():
            evidence = Evidence(call.view, forward)
            before = self._state(call)
        self.traced.marks.append(marks.begins(call.given, number))
        with evidence.watching(self.reads):
            out = forward(*args, **kwargs)
        know(out)
        leaves, spec = pytree.tree_flatten(out)
        given = {id(t): i for i, t in reversed(list(enumerate(call.given)))}
        made = list({id(x): x for x in leaves if isinstance(x, Tensor) and id(x) not in given}.values())
        if made:
            self.traced.marks.append(marks.ends(made, number))
        with compat.untraced():
            evidence.settle()
            same = not evidence.reason and len(self.traced.marks) == count + 2 and _are(before, self._state(call)) and \
                self._leaves_inputs(call, args, kwargs) and self._can_be_again(call, leaves, made)
        if not same:
            group.misses += 1
            return out
        new = {id(t): i for i, t in enumerate(made)}
        places = [x if not isinstance(x, Tensor) else _TensorPlace(id(x) in new, (new if id(x) in new else given)[id(x)])
                  for x in leaves]
        group.classes.append(_TracedLayer(number, call, evidence, made, places, spec))
        return out

    def _leaves_inputs(self, call: _LayerCall, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether what a call was given is as it was."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        return spec == call.spec and _are([leaves], [call.leaves]) and \
            [None if isinstance(x, Tensor) else call.view.describe(x) for x in leaves] == call.rest

    def _can_be_again(self, call: _LayerCall, leaves: list[Any], made: list[Tensor]) -> bool:
        """Whether `marks.again` makes what a layer returns: it says by the inputs whether results have gradients."""
        wants = torch.is_grad_enabled() and any(t.requires_grad for t in call.given)
        return all(isinstance(x, (Tensor, *SIMPLE)) for x in leaves) and all(
            compat.trace_facts(t) is not None and t.requires_grad == (wants and (t.is_floating_point() or t.is_complex()))
            for t in made)

    def _state(self, call: _LayerCall) -> list[list[Any]]:
        """What a layer may write to: what the model's attributes hold, the tables of the layer, the versions of the tensors that
        it was given, and PyTorch's settings."""
        tables = [*call.view.tables, *(m._modules for m in call.view.modules)]
        return [*([*t, *t.values()] for t in tables), *self.record.held(), [t._version for t in call.given],
                list(compat.trace_modes())]

    def _again(self, known: _TracedLayer, call: _LayerCall) -> Any:
        made = marks.again(call.given, known.made, known.number)
        return pytree.tree_unflatten([(made if p.made else call.given)[p.index] if isinstance(p, _TensorPlace) else p
                                      for p in known.leaves], known.spec)


def _are(before: list[list[Any]], now: list[list[Any]]) -> bool:
    """Whether lists hold the same objects, or equal numbers."""
    return len(before) == len(now) and all(
        len(a) == len(b) and all(x is y or (type(x) is type(y) and isinstance(x, SIMPLE) and x == y) for x, y in zip(a, b))
        for a, b in zip(before, now))


def _members(model: nn.Module) -> Iterator[nn.Module]:
    """Members of lists of modules, each once."""
    lists = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    yield from {id(c): c for m in model.modules() if isinstance(m, lists) for c in m.children()}.values()


@contextlib.contextmanager
def traced_once(model: nn.Module, traced: TraceGuard, reads: Reads | None, record: Recorded) -> Iterator[None]:
    """Inside, a layer of the model that is equal to one that was traced leaves a mark in the trace.

    reads: what is looked at, which will be known of the layers that are not traced as well; None: it is not seen, and all layers
    are traced.
    """
    groups: dict[Hashable, _LayerGroup] = {}
    undo: list[tuple[nn.Module, Any]] = []
    layers = None if reads is None else _Layers(model, traced, reads, record)

    def wrap(group: _LayerGroup, layer: nn.Module, forward: Callable) -> Callable:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            return layers.run(group, layer, forward, args, kwargs)

        run.stands_for = forward  # type: ignore[attr-defined]
        return run

    try:
        for layer in _members(model) if layers is not None else ():
            group = groups.setdefault(tuple((path, type(m)) for path, m in layer.named_modules()), _LayerGroup())
            group.members += 1
            undo.append((layer, layer.__dict__.get("forward")))
            layer.__dict__["forward"] = wrap(group, layer, object.__getattribute__(layer, "forward"))  # which is no look at it
        yield
    finally:
        for layer, own in undo:
            del layer.__dict__["forward"]
            if own is not None:
                layer.__dict__["forward"] = own
        for group in groups.values():
            group.classes.clear()


# ---- afterwards ----


def expand_layers(exported: torch.export.ExportedProgram) -> None:
    """Replace the marks of layers by their operators, in place.

    Takes: a flat graph. Afterwards: it is as if every layer had been traced, and each result of a mark that is an output is some
    input instead.
    """
    graph, rename = exported.graph, exported.graph_signature.replace_all_uses
    nodes = list(graph.nodes)
    at = {n: i for i, n in enumerate(nodes)}
    first = {n.args[1]: n for n in nodes if n.target is marks.begins}
    last = {n.args[1]: n for n in nodes if n.target is marks.ends}
    for call in [n for n in nodes if n.target is marks.again]:
        given, _, like = call.args
        begin, end = first[like], last[like]
        values = dict(zip(begin.args[0], given, strict=True))
        with graph.inserting_before(call):
            for node in nodes[at[begin] + 1 : at[end]]:
                values[node] = graph.node_copy(node, lambda n: values.get(n, n))  # noqa: B023
                values[node].meta = _moved(node, begin, call)
        for user in list(call.users):
            made = end.args[0][user.args[1]]
            rename(user.name, values.get(made, made).name)
            user.replace_all_uses_with(values.get(made, made))
            graph.erase_node(user)
        graph.erase_node(call)
    for mark in [*first.values(), *last.values()]:
        rename(mark.name, nodes[0].name)
        mark.replace_all_uses_with(nodes[0])
        graph.erase_node(mark)


def _moved(node: fx.Node, begin: fx.Node, call: fx.Node) -> dict[str, Any]:
    """What is known of a node of one layer, for its copy in another: the modules are that layer's."""
    meta = dict(node.meta)
    stack, of_begin, of_call = (dict(n.meta.get("nn_module_stack") or {}) for n in (node, begin, call))
    if stack and of_begin and of_call:
        old, new = (next(reversed(list(s.values())))[0] for s in (of_begin, of_call))
        meta["nn_module_stack"] = dict(of_call)
        for key, (path, *kind) in list(stack.items())[len(of_begin):]:
            inner = new + path.removeprefix(old) if path.startswith(old + ".") else path
            name, again, count = key.partition("@")
            name = name.removesuffix(path) + inner if name.endswith(path) else name
            meta["nn_module_stack"][name + again + count] = (inner, *kind)
    return meta
