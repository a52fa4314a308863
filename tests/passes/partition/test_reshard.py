"""Reshards: the right part reaches every rank; the gradient that comes back is that of the global value."""

from random import Random

import pytest
import torch
from hypothesis import given, settings
from torch import fx

from fxpar.backends import simulate
from fxpar.ops import collectives
from fxpar.passes.partition.reshard import Resharder
from fxpar.sharding.factors import Factor, Factors, leaves
from fxpar.sharding.facts import describe_local, local_value
from fxpar.sharding.layout import local_shape, sharding_of, take
from fxpar.sharding.mesh import Mesh
from tests.harness import MESHES, RANDOM, random_dims, random_layout


class Exchange:
    """A value in one layout, asked for in others; run on every rank."""

    def __init__(self, mesh, dims, layout, grad=True):
        self.mesh, self.dims, self.layout = mesh, dims, layout
        self.graph = fx.Graph()
        self.value = self.graph.placeholder("x")
        describe_local(self.value, needs_grad=grad)
        self.reshard = Resharder(self.graph, mesh)
        shape = [int(torch.tensor([f.size for f in d]).prod()) for d in dims]
        self.x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def to(self, want, value=None, layout=None):
        value = self.value if value is None else value
        return self.reshard.to(value, self.dims, self.layout if layout is None else layout, want, self.value)

    def run(self, outputs):
        self.graph.output(tuple(outputs))
        self.module = fx.GraphModule(torch.nn.Module(), self.graph)
        sharding = sharding_of(self.dims, self.layout, self.mesh)
        self.inputs = [take(self.x, sharding, self.mesh, r).clone().requires_grad_() for r in range(self.mesh.world_size)]
        return simulate.run(self.module, self.mesh, [[x] for x in self.inputs])

    def part(self, want, rank, x=None):
        split = {a: f for a, f in want.items() if isinstance(f, Factor)}
        return take(self.x if x is None else x, sharding_of(self.dims, split, self.mesh), self.mesh, rank)


def example(r: Random, varying=True):
    mesh = r.choice(MESHES)
    dims = random_dims(r)
    flat = [f for d in dims for f in leaves(d)]
    layout = random_layout(r, flat, mesh, 0.7)
    wants = []
    for _ in range(r.randint(1, 3)):
        want = random_layout(r, flat, mesh, 0.7)
        wants.append({a: want.get(a, True) for a in mesh.names if a in want or (varying and r.random() < 0.5)})
    return Exchange(mesh, dims, layout), wants


@settings(max_examples=300)
@given(RANDOM)
def test_values_and_gradients(r):
    """`True`: used differently on every rank, so cotangents differ. Absent: the same, so they agree."""
    e, wants = example(r)
    outs = e.run([e.to(w) for w in wants])
    x = e.x.clone().requires_grad_()
    reference = torch.zeros((), dtype=torch.float64)
    roots, cotangents = [], []
    for i, want in enumerate(wants):
        for rank in range(e.mesh.world_size):
            have = outs[rank][i]
            assert torch.equal(have, e.part(want, rank)), (want, rank)
            at = e.mesh.coordinate(rank)
            distinct = tuple(at[a] if a in want else 0 for a in e.mesh.names)
            seed = hash((i, distinct)) % 2**31
            c = torch.randn(have.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            roots.append(have)
            cotangents.append(c)
            if all(at[a] == 0 for a in e.mesh.names if a not in want):
                reference = reference + (e.part(want, rank, x) * c).sum()
    (expected,) = torch.autograd.grad(reference, x)
    found = torch.autograd.grad(roots, e.inputs, cotangents)
    for rank, grad in enumerate(found):
        torch.testing.assert_close(grad, e.part(e.layout, rank, expected), rtol=1e-12, atol=1e-12)


@settings(max_examples=200)
@given(RANDOM)
def test_there_and_back_is_the_identity(r):
    e, (want, *_) = example(r, varying=False)
    there = e.to(want)
    back = e.to(e.layout, there, want)
    outs = e.run([there, back])
    for rank, (_, mine) in enumerate(outs):
        assert torch.equal(mine, e.inputs[rank])
    found = torch.autograd.grad([o[1] for o in outs], e.inputs, [2 * x.detach() for x in e.inputs])
    assert all(torch.equal(g, 2 * x) for g, x in zip(found, e.inputs, strict=True))


@given(RANDOM)
def test_the_same_request_is_answered_with_the_same_node(r):
    e, wants = example(r)
    assert all(e.to(w) is e.to(dict(w)) for w in wants)
    assert e.to(e.layout) is e.value


@given(RANDOM)
def test_a_value_without_gradient_is_never_varied(r):
    e, wants = example(r)
    plain = Exchange(e.mesh, e.dims, e.layout, grad=False)
    outs = [plain.to(w) for w in wants]
    assert not any(made is not None and made.varies for made in map(collectives.typed, plain.graph.nodes))
    for rank, mine in enumerate(plain.run(outs)):
        assert all(torch.equal(m, e.part(w, rank)) for m, w in zip(mine, wants, strict=True))


@given(RANDOM)
def test_measured_bytes_are_what_a_rank_holds(r):
    e, wants = example(r)
    describe_local(e.value, full=e.x)
    nodes = [e.to(w) for w in wants]
    for node, mine in zip(nodes, e.run(nodes)[0], strict=True):
        if node is not e.value:
            assert local_value(node).bytes == mine.numel() * mine.element_size()


# ---- parameters that are stored in other layouts than they are used in ----


class Stored(Exchange):
    """A parameter that is stored in `layout` and used in `used`; kept as float64 and, if `cast`, computed in float32."""

    def __init__(self, mesh, dims, stored, used, cast):
        super().__init__(mesh, dims, stored)
        self.used, self.asked = used, self.value
        describe_local(self.value, stored=stored, dtype=torch.float64)
        if cast:
            self.asked = self.graph.call_function(torch.ops.aten.to.dtype, (self.value, torch.float32))
            self.asked.meta["val"] = self.x.float()
            describe_local(self.asked, stored=stored, needs_grad=True, dtype=torch.float32, reduce_dtype=torch.float64)

    def to(self, want, value=None, layout=None):
        return super().to(want, self.asked, self.used)


def stored_example(r: Random, cast: bool):
    """Uses that are split at least as the parameter is used, and that differ or agree along the other axes."""
    mesh = r.choice(MESHES)
    dims = random_dims(r)
    flat = [f for d in dims for f in leaves(d)]
    stored = random_layout(r, flat, mesh, 0.8)
    used = {a: f for a, f in stored.items() if r.random() < 0.5}
    used = {a: f for a, f in used.items() if all(used.get(b) is f for b, g in stored.items() if g is f)}
    wants = [
        used | {a: True for a in mesh.names if a not in used and r.random() < 0.6} for _ in range(r.randint(1, 3))
    ]
    wants = [w for i, w in enumerate(wants) if w not in wants[:i]]
    return Stored(mesh, dims, stored, used, cast), wants


def check_stored(e, wants, tolerance):
    """Values are exact; gradients are the sum, made in float64, of cotangents as wide as the values."""
    outs = e.run([e.to(w) for w in wants])
    x = e.x.clone().requires_grad_()
    reference, roots, cotangents = torch.zeros((), dtype=torch.float64), [], []
    for i, want in enumerate(wants):
        for rank in range(e.mesh.world_size):
            have, at = outs[rank][i], e.mesh.coordinate(rank)
            assert torch.equal(have, e.part(want, rank).to(have.dtype)), (want, rank)
            distinct = tuple(at[a] if a in want else 0 for a in e.mesh.names)
            made = torch.Generator().manual_seed(hash((i, distinct)) % 2**31)
            roots.append(have)
            cotangents.append(torch.randn(have.shape, dtype=have.dtype, generator=made))
            if all(at[a] == 0 for a in e.mesh.names if a not in want):
                reference = reference + (e.part(want, rank, x) * cotangents[-1].double()).sum()
    (expected,) = torch.autograd.grad(reference, x)
    for rank, grad in enumerate(torch.autograd.grad(roots, e.inputs, cotangents)):
        torch.testing.assert_close(grad, e.part(e.layout, rank, expected), rtol=tolerance, atol=tolerance)


@settings(max_examples=200)
@given(RANDOM)
def test_stored_parameters(r):
    check_stored(*stored_example(r, cast=False), 1e-12)


@settings(max_examples=200)
@given(RANDOM)
def test_stored_parameters_are_gathered_narrow_and_their_gradients_summed_wide(r):
    e, wants = stored_example(r, cast=True)
    gathered = [a for a in e.layout if a not in e.used]
    check_stored(e, wants, 1e-12 if len(gathered) < 2 else 1e-5)  # the second of two gathers has a narrow operand


@given(RANDOM)
def test_a_stored_parameter_is_gathered_once_for_uses_alike(r):
    e, wants = stored_example(r, cast=r.random() < 0.5)
    assert all(e.to(w) is e.to(dict(w)) for w in wants)
    made = {n: made for n in e.graph.nodes if (made := collectives.typed(n)) is not None and made.gathers}
    assert all(local_value(n).unshard for n in made)
    assert len(made) == len(set(made.values()))


# ---- what is issued ----

MESH = Mesh(("a", "b"), (2, 2))


def issued(layout, want, dims, mesh=MESH):
    e = Exchange(mesh, dims, layout)
    node, out = e.to(want), []
    while node is not e.value:
        made = collectives.typed(node)
        out.append((node.target.__name__, made.axes))
        node = made.value
    return out[::-1]


@pytest.mark.parametrize(
    "layout, want, kinds",
    [
        ({"a": 0}, {"a": 0}, []),
        ({}, {"a": True}, [("vary", ("a",))]),
        ({}, {"a": True, "b": True}, [("vary", ("a", "b"))]),
        ({"a": 0}, {"a": True}, [("all_gather", ("a",))]),
        ({"a": 0}, {}, [("all_gather", ("a",))]),
        ({}, {"a": 0}, [("shard", ("a",))]),
        ({"a": 0}, {"a": 1}, [("all_to_all", ("a",))]),
        ({"a": 0, "b": 0}, {"a": 0}, [("all_gather", ("b",))]),
        ({"a": 0, "b": 0}, {"a": 0, "b": 1}, [("all_gather", ("b",)), ("shard", ("b",))]),
        ({"b": 0}, {"a": 0, "b": 0}, [("all_gather", ("b",)), ("shard", ("a",)), ("shard", ("b",))]),
        (
            {"a": 0, "b": 1},
            {"a": 1, "b": 0},
            [("all_gather", ("b",)), ("all_gather", ("a",)), ("shard", ("a",)), ("shard", ("b",))],
        ),
    ],
)
def test_collectives(layout, want, kinds):
    dims = Factors().fresh([8, 8])
    flat = [d[0] for d in dims]

    def named(places):
        return {a: flat[i] if i is not True else True for a, i in places.items()}

    assert issued(named(layout), named(want), dims) == kinds


# ---- collectives that reshards of replicated values do not use ----


def partials(kind, *args, axes=("a",), mesh=MESH):
    """Runs a collective on a value that is partial: every rank has its own x."""
    graph = fx.Graph()
    graph.output((graph.call_function(kind, (graph.placeholder("x"), axes, *args)),))
    module = fx.GraphModule(torch.nn.Module(), graph)
    xs = [
        torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(r)).requires_grad_()
        for r in range(mesh.world_size)
    ]
    return xs, [o[0] for o in simulate.run(module, mesh, [[x] for x in xs])]


@pytest.mark.parametrize("axes", [("a",), ("b",), ("a", "b")])
def test_psum_adds_and_its_backward_is_the_identity(axes):
    xs, ys = partials(collectives.psum, axes=axes)
    for group in MESH.groups(axes):
        total = sum(xs[r] for r in group)
        cotangent = torch.randn(4, 6, dtype=torch.float64)
        found = torch.autograd.grad(
            [ys[r] for r in group], [xs[r] for r in group], [cotangent] * len(group), retain_graph=True
        )
        assert all(torch.allclose(ys[r], total) for r in group)
        (expected,) = torch.autograd.grad(total, xs[group[0]], cotangent)
        assert all(torch.equal(g, expected) for g in found)


@pytest.mark.parametrize("dim, outer", [(0, 1), (0, 2), (1, 1), (1, 3)])
def test_reduce_scatter_is_a_slice_of_the_sum(dim, outer):
    xs, ys = partials(collectives.reduce_scatter, dim, outer)
    factors = Factors()
    dims = tuple(factors.new(n) for n in (4, 6))
    sizes = [4, 6]
    if outer > 1:
        factors.split(dims[dim][0], outer)
    layout = {"a": leaves(dims[dim])[-1]}
    sharding = sharding_of(dims, layout, MESH)
    for group in MESH.groups(("a",)):
        total = sum(xs[r] for r in group)
        cotangent = torch.randn(sizes, dtype=torch.float64)
        parts = [take(cotangent, sharding, MESH, r).contiguous() for r in group]
        for r in group:
            assert list(ys[r].shape) == local_shape(dims, layout, MESH)
            assert torch.allclose(ys[r], take(total, sharding, MESH, r))
        found = torch.autograd.grad([ys[r] for r in group], [xs[r] for r in group], parts, retain_graph=True)
        assert all(torch.equal(g, cotangent) for g in found)


@pytest.mark.parametrize("axes", [("a",), ("b",), ("a", "b")])
def test_pmax_is_the_maximum_and_carries_no_gradient(axes):
    xs, ys = partials(collectives.pmax, axes=axes)
    for group in MESH.groups(axes):
        top = torch.stack([xs[r] for r in group]).amax(0)
        assert all(torch.equal(ys[r], top) and not ys[r].requires_grad for r in group)


@pytest.mark.parametrize("kind", [kind for kind, (_, backward) in collectives.CONJUGATE.items() if backward is not None])
def test_the_backward_of_a_collective_has_the_shape_of_its_input(kind):
    forward, backward = collectives.CONJUGATE[kind]
    mesh, place, to = Mesh(("a",), (2,)), (0, 2), (1, 1)
    xs = [torch.randn(8, 6, dtype=torch.float64) for _ in range(2)]
    ys = simulate.run_all(forward, mesh, ("a",), place, to, xs)
    assert all(
        g.shape == x.shape for g, x in zip(simulate.run_all(backward, mesh, ("a",), place, to, ys), xs, strict=True)
    )
