"""Small programs in random layouts, run on every rank in this process and compared with one device.

The partitioner must be right for *every* layout, not only for those that a plan arrives at. So `lay_out`
replaces `fxpar.passes.place.place`: each value and each operator gets any layout that its rule allows.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxpar.backends import simulate
from fxpar.passes.infer.infer import infer
from fxpar.passes.infer.rules import Spec
from fxpar.passes.partition.partition import partition
from fxpar.passes.place.place import _candidates, appends, scatterable
from fxpar.plan import Plan
from fxpar.program import Program, Sink, Source
from fxpar.sharding.factors import Dims, Factor, Factors, leaves
from fxpar.sharding.facts import dims_of, global_value, local_value, sharding_at
from fxpar.sharding.layout import Layout, fits, restrict, take
from fxpar.sharding.mesh import Mesh
from fxpar.sharding.placement import Placement, Placements

MESHES = [
    Mesh(("a",), (2,)),
    Mesh(("a",), (3,)),
    Mesh(("a",), (4,)),
    Mesh(("a", "b"), (2, 2)),
    Mesh(("a", "b"), (3, 2)),
    Mesh(("a", "b", "c"), (2, 2, 2)),
]
SIZES = (1, 2, 2, 3, 4, 4, 6, 6, 8, 12)
VALUES = {torch.float64: 1e-10, torch.complex128: 1e-10, torch.float32: 1e-6, torch.complex64: 1e-6}
GRADIENTS = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-5, torch.complex64: 1e-5}
"""What may be off, relative to the largest element. Every other dtype must agree exactly."""


class Seeded(Random):
    """A generator that prints as what makes it again."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.made_by = seed

    def __repr__(self) -> str:
        return f"Seeded({self.made_by})"


RANDOM = st.integers(0, 2**64 - 1).map(Seeded)
"""Choices from a seed: hypothesis's own `randoms` favours 0; a few dozen examples would reach too little."""


class Gen:
    """Random arguments. Every tensor it makes may become an operand of the program."""

    def __init__(self, r: Random, dtype: torch.dtype | None = None):
        self.r = r
        self.torch = torch.Generator().manual_seed(r.getrandbits(31))
        self.constants: list[Tensor] = []
        self.dtype = dtype or (torch.float32 if r.random() < 0.25 else torch.float64)

    def n(self, least: int = 1) -> int:
        return self.r.choice([s for s in SIZES if s >= least])

    def shape(self, low: int = 1, high: int = 4, least: int = 1) -> list[int]:
        """Between `low` and `high` dims, of at most a few hundred elements."""
        out: list[int] = []
        for _ in range(self.r.randint(low, high)):
            room = 300 // max(1, torch.Size(out).numel())
            out.append(self.r.choice([s for s in SIZES if least <= s <= max(room, least, 2)]))
        return out

    def dim(self, rank: int) -> int:
        """A dim of a tensor of that rank, counted from either end."""
        return self.r.randint(-rank, rank - 1)

    def dims(self, rank: int, least: int = 1) -> list[int]:
        """Several different dims."""
        chosen = self.r.sample(range(rank), self.r.randint(min(least, rank), rank))
        return [d - rank if self.r.random() < 0.5 else d for d in chosen]

    def maybe(self, p: float = 0.5) -> bool:
        return self.r.random() < p

    def pick(self, *options: Any) -> Any:
        return self.r.choice(options)

    def f(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Floats; gradients may be taken."""
        return torch.randn(shape, generator=self.torch, dtype=torch.float64).to(dtype or self.dtype)

    def constant(self, x: Tensor) -> Tensor:
        """No gradient will be taken by it."""
        self.constants.append(x)
        return x

    def positive(self, *shape: int) -> Tensor:
        return self.f(*shape).abs() + 0.1

    def i(self, high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=self.torch)

    def b(self, *shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=self.torch).bool()

    def any(self, *shape: int) -> Tensor:
        """A tensor of any dtype, for operators that only move elements."""
        kind = self.r.choice(["float", "float", "float", "bf16", "int", "bool"])
        if kind == "bf16":
            return self.f(*shape, dtype=torch.bfloat16)
        return {"float": self.f, "int": lambda *s: self.i(100, *s), "bool": self.b}[kind](*shape)

    def broadcast(self, shape: list[int]) -> list[int]:
        """A shape that broadcasts to `shape`."""
        cut = self.r.choice([0, 0, 0, self.r.randint(0, len(shape))])
        return [1 if self.maybe(0.2) else n for n in shape[cut:]]


@dataclass
class Build:
    """A graph under construction; its values are computed on the way."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    sources: list[Source] = field(default_factory=list)
    feeds: list[Tensor] = field(default_factory=list)

    def source(self, value: Tensor, grad: bool) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.feeds)}")
        node.meta["val"] = value
        self.sources.append(Source("param", node.name, value.detach(), requires_grad=grad))
        self.feeds.append(value)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        value = target(*_values(args), **_values(kwargs))
        node.meta["val"] = tuple(value) if isinstance(value, list) else value
        return node

    def program(self, outputs: list[fx.Node], mesh: Mesh) -> Program:
        self.graph.output(tuple(outputs))
        sinks = [Sink("output", str(i)) for i in range(len(outputs))]
        spec = pytree.tree_structure(tuple(range(len(outputs))))
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        return Program(module, self.sources, sinks, spec, Plan(), mesh, training=True)


def _values(tree: Any) -> Any:
    return fx.map_arg(tree, lambda n: n.meta["val"])


def one_op(r: Random, target: Any, args: tuple, kwargs: dict[str, Any], constants: list[Tensor]) -> Build:
    """The operator as a program: its tensors are placeholders, now and then seen through a `view`.

    Those views make dims of several factors, before the operator and after it.
    """
    build, made, outputs = Build(), {}, []

    def operand(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in made:
            made[id(x)] = (_refined(r, build, x, any(x is c for c in constants)), x)
        return made[id(x)][0]

    with_nodes = pytree.tree_map(operand, (tuple(args), dict(kwargs)))
    node = build.call(target, *with_nodes[0], **with_nodes[1])
    value = node.meta["val"]
    if isinstance(value, Tensor):
        results = [node]
    else:
        results = [build.call(operator.getitem, node, i) for i, v in enumerate(value) if isinstance(v, Tensor)]
    for result in results:
        shape = _cut(r, list(result.meta["val"].shape)) if r.random() < 0.3 else None
        outputs.append(build.call(torch.ops.aten.reshape.default, result, shape) if shape else result)
        if shape and r.random() < 0.5:
            outputs.append(result)
    build.outputs = outputs  # type: ignore[attr-defined]
    return build


def _refined(r: Random, build: Build, x: Tensor, constant: bool) -> fx.Node:
    grad = not constant and (x.is_floating_point() or x.is_complex()) and r.random() < 0.85
    shape = _cut(r, list(x.shape)) if r.random() < 0.4 else None
    if shape is None or not x.is_contiguous():
        return build.source(x, grad)
    return build.call(torch.ops.aten.view.default, build.source(x.reshape(shape), grad), list(x.shape))


def _cut(r: Random, shape: list[int]) -> list[int] | None:
    """The shape with one dim cut in two, if it has one that can be."""
    able = [i for i, n in enumerate(shape) if n in (4, 6, 8, 12, 16, 24)]
    if not able:
        return None
    i = r.choice(able)
    major = r.choice([k for k in (2, 3, 4, 6) if shape[i] % k == 0 and k < shape[i]])
    return [*shape[:i], major, shape[i] // major, *shape[i + 1 :]]


def lay_out(program: Program, r: Random) -> Program:
    """What `place` does, at random: any layout that the rules allow."""
    mesh = program.mesh
    placed = program.placements = Placements()
    for node in program.graph.nodes:
        if node.op == "placeholder" and global_value(node).dims is not None:
            placed.layouts[node] = random_layout(r, [f for d in dims_of(node) for f in leaves(d)], mesh, 0.6)
        elif node.target is operator.getitem:
            placed.layouts[node] = dict(placed.operators[node.args[0]].layouts[global_value(node).position])
        elif global_value(node).spec is not None:
            placement = placed.operators[node] = _placement(global_value(node).spec, r, mesh)
            single = isinstance(node.meta["val"], Tensor)
            placed.layouts[node] = placement.layouts[0] if single else placement.layouts
    return program


def random_dims(r: Random) -> Dims:
    """The dims of a tensor: up to three, each of up to three factors."""
    factors = Factors()
    return factors.beside(
        tuple(
            tuple(f for n in r.choices((1, 2, 3, 4, 6, 8), k=r.randint(0, 3)) for f in factors.new(n))
            for _ in range(r.randint(1, 3))
        )
    )


def random_layout(r: Random, order: list[Factor], mesh: Mesh, p: float) -> Layout:
    """Each axis, with probability `p`, on a factor that it can still split."""
    at: Layout = {}
    for axis in mesh.names:
        able = [f for f in order if fits(at, f, axis, mesh)]
        if able and r.random() < p:
            at[axis] = r.choice(able)
    return at


def _placement(spec: Spec, r: Random, mesh: Mesh) -> Placement:
    at = random_layout(r, _candidates(spec), mesh, 0.85)
    sums = {f for s in spec.sums for f in s.leaves()}
    maxes = {f for s in spec.maxes for f in s.leaves()}
    pending = {a: "sum" if f in sums else "max" for a, f in at.items() if f in sums or f in maxes}
    placement = Placement(at, [restrict(at, dims) for dims in spec.outs], pending)
    if len(spec.outs) == 1:
        for axis in [a for a in mesh.names if pending.get(a) == "sum"]:
            able = [f for f in scatterable(spec) if appends(placement.layouts[0], f, axis, mesh)]
            if able and r.random() < 0.5:
                placement.layouts[0][axis] = placement.scatter[axis] = r.choice(able)
    return placement


def check(build: Build, r: Random, mesh: Mesh, values: bool = True) -> Program:
    """`check_program` for a graph built here."""
    return check_program(build.program(build.outputs, mesh), build.feeds, r, values)  # type: ignore[attr-defined]


def check_program(program: Program, feeds: list[Tensor], r: Random, values: bool = True) -> Program:
    """Infer, lay out, partition, run on all ranks; compare outputs and gradients with the program on one device.

    feeds: the value of each placeholder. values: False where the program leaves elements undefined (`empty`):
    then shapes and dtypes alone.
    """
    mesh = program.mesh
    full = _on_one_device(program, feeds)
    cotangents = [
        torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(i)) if w.requires_grad else None
        for i, w in enumerate(full[0])
    ]
    expected = _gradients([full[0]], full[1], [cotangents])
    program = partition(lay_out(infer(program), r))
    text = _describe(program)
    nodes = program.placeholders()
    locals_ = [
        [
            take(x, sharding_at(n), mesh, rank).clone().requires_grad_(s.requires_grad)
            for x, n, s in zip(feeds, nodes, program.sources, strict=True)
        ]
        for rank in range(mesh.world_size)
    ]
    results = simulate.run(program.module, mesh, locals_)
    parts = [
        [
            None if c is None else take(c, sharding_at(n), mesh, rank).contiguous()
            for c, n in zip(cotangents, program.outputs(), strict=True)
        ]
        for rank in range(mesh.world_size)
    ]
    for rank, mine in enumerate(results):
        for i, (node, total, have) in enumerate(zip(program.outputs(), full[0], mine, strict=True)):
            want = take(total, sharding_at(node), mesh, rank)
            _compare(f"output {i} on rank {rank}", have, want, total, VALUES, text, values)
    if not values:
        return program
    wants = [i for i, s in enumerate(program.sources) if s.requires_grad]
    flat = [feed[i] for feed in locals_ for i in wants]
    found = _gradients(results, flat, parts)
    for rank in range(mesh.world_size):
        for k, i in enumerate(wants):
            have = found[rank * len(wants) + k]
            want = take(expected[k], sharding_at(nodes[i]), mesh, rank)
            _compare(
                f"the gradient of {nodes[i].name} on rank {rank}",
                have,
                want,
                expected[k],
                GRADIENTS,
                text,
                True,
            )
    return program


def _on_one_device(program: Program, feeds: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The program on one device: its outputs, and the inputs to differentiate them by."""
    own = [x.detach().clone().requires_grad_(s.requires_grad) for x, s in zip(feeds, program.sources, strict=True)]
    outs = fx.Interpreter(program.module).run(*own)
    return list(outs), [x for x in own if x.requires_grad]


def _gradients(outs: list[list[Tensor]], wants: list[Tensor], cotangents: list[list[Tensor | None]]) -> list[Tensor]:
    roots = [
        (o, c)
        for os, cs in zip(outs, cotangents, strict=True)
        for o, c in zip(os, cs, strict=True)
        if c is not None and o.requires_grad
    ]
    if not roots or not wants:
        return [torch.zeros_like(w) for w in wants]
    found = torch.autograd.grad([o for o, _ in roots], wants, [c for _, c in roots], allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wants, found, strict=True)]


def _compare(what: str, have: Tensor, want: Tensor, total: Tensor, tolerance: dict, text: str, values: bool) -> None:
    assert have.dtype == want.dtype, f"{what}: {have.dtype} instead of {want.dtype}\n{text}"
    assert have.shape == want.shape, f"{what}: shape {list(have.shape)} instead of {list(want.shape)}\n{text}"
    if not values:
        return
    have, want = have.detach(), want.detach()
    if have.dtype in tolerance:
        finite = total.detach()[total.detach().isfinite()]
        scale = max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
        off = torch.where(have == want, 0.0, (have - want).abs())
        off = torch.where(have.isnan() & want.isnan(), 0.0, off)
        worst = off.max().item() if off.numel() else 0.0
        assert worst <= tolerance[have.dtype] * scale, f"{what}: off by {worst:.3g} of {scale:.3g}\n{text}"
    elif tolerance is VALUES:
        assert torch.equal(have, want), f"{what}: {have} instead of {want}\n{text}"


def _describe(program: Program) -> str:
    lines = [f"mesh {program.mesh}"]
    for node in program.graph.nodes:
        lines.append(f"  {node.format_node()}  {local_value(node).layout_text}")
    return "\n".join(lines)
