"""random: every random operator drawn from the counter-based generator, so that a plan does not change what it draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxpar import compat
from fxpar.errors import UnsupportedOperator
from fxpar.ops.random import digits, drawn
from fxpar.passes.canonical.dropout import seed_of
from fxpar.passes.infer.rules.registry import find
from fxpar.passes.infer.rules.spec import bind
from fxpar.passes.rewrite import Rewriter, device_of, remove_unread
from fxpar.program import Program, user_line

aten = torch.ops.aten


def counter_random(program: Program) -> Program:
    """Rewrite, in place, every random operator but dropout to `fxpar.ops.random.drawn`, and what else it computes.

    Takes: a simplified program, whose dropout is drawn from it already. Afterwards: if anything was rewritten there is a source
    "seed" (an int64 scalar that the caller passes at every step); each draw has a site number, in program order. As in PyTorch,
    no gradient goes through a draw to what it is drawn with.
    Raises: `UnsupportedOperator` for a random operator whose numbers no counter can make, with the line of the model.
    """
    found = [n for n in program.graph.nodes if compat.is_random(n.target) and find(n.target) is None]
    if not found:
        return program
    seed = seed_of(program, device_of(found[0]))
    for site, node in enumerate(found):
        build = BUILDERS.get(node.target)
        arguments = bind(node)
        if build is None or node.meta["val"].dtype.is_complex:
            raise _refusal(node)
        draw = _Draw(program.graph, node, seed, site)
        made = build(draw, arguments)
        draw.replace(made if made.meta["val"].dtype == draw.value.dtype else draw.call(aten.to.dtype, made, draw.value.dtype))
    remove_unread(program.graph)
    return program


def _refusal(node: fx.Node) -> UnsupportedOperator:
    return UnsupportedOperator(
        str(node.target), where=user_line(node),
        way_out="Its random numbers would depend on the plan. Draw with torch.rand, randn, randint, bernoulli, exponential, "
        "normal, multinomial or randperm, whose numbers fxpar makes by a counter-based generator, or make the random tensor "
        "outside of the model and pass it as an input.")


class _Draw(Rewriter):
    """Builds what stands for one random operator."""

    def __init__(self, graph: fx.Graph, node: fx.Node, seed: fx.Node, site: int):
        super().__init__(graph, node)
        self.seed, self.site = seed, site
        self.value: torch.Tensor = node.meta["val"]

    def of(self, kind: str, dtype: torch.dtype | None = None, size: list[int] | None = None) -> fx.Node:
        """Random numbers of this operator; of the result's size where none is given."""
        size = [int(n) for n in self.value.shape] if size is None else size
        return self.call(drawn, size, self.seed, kind=kind, site=self.site, dtype=dtype or self.value.dtype,
                         device=self.value.device)

    def number(self, given: Any) -> Any:
        """What numbers are drawn with, without its gradient."""
        return self.call(aten.detach.default, given) if isinstance(given, fx.Node) else given

    def scaled(self, x: fx.Node, by: Any, plus: Any) -> fx.Node:
        x = x if isinstance(by, int | float) and by == 1 else self.call(aten.mul.Tensor, x, self.number(by))
        return x if isinstance(plus, int | float) and plus == 0 else self.call(aten.add.Tensor, x, self.number(plus))


def _uniform(d: _Draw, a: dict[str, Any]) -> fx.Node:
    low, high = a.get("from", 0), a.get("to", 1)
    return d.scaled(d.of("uniform"), high - low, low)


def _normal(d: _Draw, a: dict[str, Any]) -> fx.Node:
    return d.scaled(d.of("normal"), a.get("std", 1), a.get("mean", 0))


def _log_normal(d: _Draw, a: dict[str, Any]) -> fx.Node:
    return d.call(aten.exp.default, _normal(d, a))


def _exponential(d: _Draw, a: dict[str, Any]) -> fx.Node:
    return d.scaled(d.of("exponential"), 1 / a["lambd"], 0)


def _geometric(d: _Draw, a: dict[str, Any]) -> fx.Node:
    """How many trials there are up to the first success, each of which succeeds with probability p."""
    wide = d.of("exponential", torch.float64)
    return d.call(aten.clamp_min.default, d.call(aten.ceil.default, d.scaled(wide, -1 / math.log1p(-a["p"]), 0)), 1)


def _cauchy(d: _Draw, a: dict[str, Any]) -> fx.Node:
    angle = d.call(aten.mul.Tensor, d.call(aten.sub.Tensor, d.of("uniform"), 0.5), math.pi)
    return d.scaled(d.call(aten.tan.default, angle), a["sigma"], a["median"])


def _bernoulli(d: _Draw, a: dict[str, Any]) -> fx.Node:
    """With the probability `p`, or else with those of the operand."""
    p = d.number(a.get("p", a["self"]))
    wide = p.meta["val"].dtype if isinstance(p, fx.Node) else torch.float32
    drawn_from = d.of("uniform", torch.float64 if wide is torch.float64 else torch.float32)
    return d.call(aten.lt.Tensor if isinstance(p, fx.Node) else aten.lt.Scalar, drawn_from, p)


def _integers(d: _Draw, low: int, high: int | fx.Node) -> fx.Node:
    every = d.of("integer", torch.int64)
    if isinstance(high, fx.Node):
        return d.call(aten.remainder.Tensor, every, high)
    return d.scaled(d.call(aten.remainder.Scalar, every, high - low), 1, low)


def _randint(d: _Draw, a: dict[str, Any]) -> fx.Node:
    return _integers(d, a.get("low", 0), a["high"])


def _random(d: _Draw, a: dict[str, Any]) -> fx.Node:
    """Integers in a range, or all those that the dtype has exactly."""
    dtype = d.value.dtype
    most = 2**digits(dtype) if dtype.is_floating_point else 1 if dtype is torch.bool else torch.iinfo(dtype).max
    high = a.get("to")
    return _integers(d, a.get("from", 0), min(most, 2**63 - 2) + 1 if high is None else high)


def _randperm(d: _Draw, a: dict[str, Any]) -> fx.Node:
    return d.call(aten.argsort.stable, d.of("integer", torch.int64), stable=True)


def _multinomial(d: _Draw, a: dict[str, Any]) -> fx.Node:
    """The largest of p / q, with an exponential q for each: the next ones are those of what is left."""
    p, count = d.number(a["self"]), a["num_samples"]
    shape, dtype = [int(n) for n in p.meta["val"].shape], p.meta["val"].dtype
    if a["replacement"]:
        shape.insert(-1, count)
        p = d.call(aten.unsqueeze.default, p, -2)
        return d.call(aten.argmax.default, d.call(aten.div.Tensor, p, d.of("exponential", dtype, shape)), -1)
    race = d.call(aten.div.Tensor, p, d.of("exponential", dtype, shape))
    return d.call(aten.slice.Tensor, d.call(aten.argsort.default, race, -1, True), -1, 0, count)


def _rrelu(d: _Draw, a: dict[str, Any]) -> fx.Node:
    """A leaky ReLU whose slopes are drawn; their mean, where it does not train."""
    low, high = a["lower"], a["upper"]
    slope = d.scaled(d.of("uniform"), high - low, low) if a["training"] else (low + high) / 2
    return d.call(aten.where.self, d.call(aten.ge.Scalar, a["self"], 0), a["self"], d.call(aten.mul.Tensor, a["self"], slope))


Builder = Callable[[_Draw, dict[str, Any]], fx.Node]


def _overloads(*names: str) -> list[Any]:
    """The overloads that draw, of those of these operators that this version of PyTorch has; not those that write to a tensor."""
    found = []
    for name in names:
        packet = getattr(aten, name)
        found += [o for o in (getattr(packet, each) for each in packet.overloads()) if not compat.mutates(o)]
    return found


BUILDERS: dict[Any, Builder] = {
    overload: build
    for build, names in (
        (_uniform, ("rand", "rand_like", "uniform")), (_normal, ("randn", "randn_like", "normal", "normal_functional")),
        (_log_normal, ("log_normal",)), (_exponential, ("exponential",)), (_geometric, ("geometric",)),
        (_cauchy, ("cauchy",)), (_bernoulli, ("bernoulli",)), (_randint, ("randint", "randint_like")), (_random, ("random",)),
        (_randperm, ("randperm",)), (_multinomial, ("multinomial",)), (_rrelu, ("rrelu",)))
    for overload in _overloads(*names)
}  # fmt: skip
