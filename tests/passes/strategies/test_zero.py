"""Where parameters are stored: in parts over the axes of ZeRO, and otherwise as they are used."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from torch import fx, nn
from torch.utils import _pytree as pytree

import fxpar
from fxpar import compiler
from fxpar.errors import PlanError
from fxpar.model.inputs import example_call
from fxpar.passes.strategies.zero import shard_storage
from fxpar.plan import Plan
from fxpar.program import Program, Source
from fxpar.sharding import mesh
from fxpar.sharding.factors import Factors, leaves
from fxpar.sharding.facts import describe_global, dims_of, sharding_at
from fxpar.sharding.layout import local_shape, put, sharding_of, take
from fxpar.sharding.mesh import Mesh
from fxpar.sharding.placement import Placements
from tests import zoo
from tests.harness import RANDOM, random_dims, random_layout

MESHES = [
    Mesh(("dp",), (2,), {"zero": ("dp",)}),
    Mesh(("dp",), (3,), {"zero": ("dp",)}),
    Mesh(("dp", "tp"), (4, 2), {"zero": ("dp",)}),
    Mesh(("dp_replicate", "dp_shard", "tp"), (2, 2, 2), {"zero": ("dp_shard",)}),
    Mesh(("dp_replicate", "dp_shard", "tp0", "tp1"), (2, 2, 2, 2), {"zero": ("dp_shard",)}),
]


def program_of(on: Mesh, parameters: list) -> Program:
    """A placed program of parameters alone: pairs (dims, layout of the use)."""
    graph, sources, placed = fx.Graph(), [], Placements()
    for i, (dims, layout) in enumerate(parameters):
        node = graph.placeholder(f"p{i}")
        shape = [math.prod(f.size for f in d) for d in dims]
        value = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
        node.meta["val"] = value
        describe_global(node, dims=dims)
        placed.layouts[node] = layout
        sources.append(Source("param", node.name, value, requires_grad=True))
    graph.output(())
    return Program(fx.GraphModule(nn.Module(), graph), sources, [], pytree.tree_structure(()), Plan(), on, training=True,
                   placements=placed)


def example(r: Random) -> Program:
    on = r.choice(MESHES)
    others = [a for a in on.names if a not in on.strategies["zero"]]
    rest = Mesh(tuple(others), tuple(map(on.size, others)))
    many = [random_dims(r) for _ in range(4)]
    return program_of(on, [(d, random_layout(r, [f for dim in d for f in leaves(dim)], rest, 0.5)) for d in many])


def stored_of(program: Program, node: fx.Node) -> dict:
    return program.placements.storage(node)


@settings(max_examples=300)
@given(RANDOM)
def test_what_can_be_is_stored_in_parts_and_the_rest_is_noted(r):
    program = shard_storage(example(r))
    (axis,), on = program.mesh.strategies["zero"], program.mesh
    unsharded = []
    for node, source in program.source_of().items():
        dims, used, stored = dims_of(node), program.placements.layouts[node], stored_of(program, node)
        assert {a: f for a, f in stored.items() if a != axis} == used
        free = {f for d in dims if not set(leaves(d)) & set(used.values()) for f in leaves(d)}
        if any(f.size % on.size(axis) == 0 for f in free):
            part = math.prod(local_shape(dims, stored, on))
            assert part * on.size(axis) == math.prod(local_shape(dims, used, on)) and stored[axis] in free
        else:
            assert node not in program.placements.stored
            unsharded.append(source)
    notes = [n for n in program.notes if "ZeRO" in n]
    assert len(notes) == bool(unsharded)
    if unsharded:
        share = sum(s.value.numel() for s in unsharded) / sum(s.value.numel() for s in program.sources)
        assert notes[0].startswith(f"{len(unsharded)} parameters ({share:.2%} of all elements; the first is {unsharded[0].name})")


@given(RANDOM)
def test_parts_make_up_the_full_tensor(r):
    program = shard_storage(example(r))
    on = program.mesh
    for node, source in program.source_of().items():
        sharding = sharding_of(dims_of(node), stored_of(program, node), on)
        parts = [take(source.value, sharding, on, rank) for rank in range(on.world_size)]
        assert all(list(p.shape) == local_shape(dims_of(node), stored_of(program, node), on) for p in parts)
        assert torch.equal(put(parts, sharding, source.value.shape, on), source.value)
        copies = torch.cat([p.reshape(-1) for p in parts]).long().bincount(minlength=source.value.numel())
        assert (copies == on.world_size // on.size(*stored_of(program, node))).all()


@given(RANDOM)
def test_storage_that_is_given_is_kept(r):
    seed = r.getrandbits(32)
    first, second = (example(Random(seed)) for _ in range(2))
    sharding = {s.name: sharding_of(dims_of(n), stored_of(first, n), first.mesh)
             for n, s in shard_storage(first).source_of().items()}
    shard_storage(second, sharding)
    for node, source in second.source_of().items():
        assert sharding_of(dims_of(node), stored_of(second, node), second.mesh) == sharding[source.name]


def test_without_zero_nothing_is_stored_apart():
    on = Mesh(("dp",), (2,), {"dp": ("dp",)})
    program = shard_storage(program_of(on, [(Factors().fresh([4]), {})]))
    assert not program.placements.stored


@pytest.mark.parametrize("sizes, used, at", [
    ([[8], [4]], {}, (0, 0)),
    ([[4], [8]], {}, (0, 0)),  # of rows before columns: they lie together
    ([[3], [8]], {}, (1, 0)),
    ([[8], [8]], {"tp": (0, 0)}, (1, 0)),
    ([[3], [4], [8]], {}, (2, 0)),
    ([[3, 8, 4]], {}, (0, 1)),
    ([[3, 4, 8]], {}, (0, 2)),
    ([[3, 4, 8], [8]], {"tp": (0, 1)}, (1, 0)),
    ([[3], [5]], {}, None),
    ([[3, 4, 8]], {"tp": (0, 1)}, None),  # one dim, one axis
])  # fmt: skip
def test_the_factor_that_is_chosen(sizes, used, at):
    factors = Factors()
    dims = factors.beside(tuple(tuple(f for n in dim for f in factors.new(n)) for dim in sizes))
    layout = {axis: dims[i][k] for axis, (i, k) in used.items()}
    program = shard_storage(program_of(Mesh(("dp", "tp"), (2, 2), {"zero": ("dp",)}), [(dims, layout)]))
    (node,) = program.placeholders()
    assert stored_of(program, node).get("dp") is (None if at is None else dims[at[0]][at[1]])


# ---- of models ----


@pytest.mark.parametrize("plan, names, zero", [
    ("dp=2,zero=1", {"dp": 2}, ("dp",)),
    ("dp=2,tp=2,zero=3", {"dp": 2, "tp": 2}, ("dp",)),
    ("dp=8,dp_replicate=2,zero=2", {"dp_replicate": 2, "dp_shard": 4}, ("dp_shard",)),
    ("dp=2,dp_replicate=2,zero=3", {"dp": 2}, ()),
    ("dp=4,dp_replicate=2", {"dp": 4}, ()),
    ("zero=3", {"dp": 1}, ()),
])  # fmt: skip
def test_the_axes_of_a_plan(plan, names, zero):
    made = mesh.from_plan(Plan.parse(plan))
    assert dict(zip(made.names, made.sizes)) == names and made.strategies.get("zero", ()) == zero
    assert made.size(*made.strategies["dp"]) == Plan.parse(plan).dp


def shardings(program: Program) -> dict:
    return {s.name: sharding_at(n) for n, s in program.source_of().items() if s.kind == "param"}


@pytest.mark.parametrize("plan, parts", [("dp=2,zero=1", 2), ("dp=4,zero=3", 4), ("dp=4,dp_replicate=2,zero=3", 2)])
def test_every_weight_of_a_model_is_stored_in_parts(plan, parts):
    model, batch = zoo.build("llama_tied")
    program = fxpar.compile_program(model, plan, batch)
    assert not any("ZeRO" in note for note in program.notes)
    for node, source in program.source_of().items():
        if source.kind == "param":
            assert take(source.value, sharding_at(node), program.mesh, 0).numel() * parts == source.value.numel()


def test_the_stages_store_and_compute_alike():
    """But for lookups: see the preferences of a plan."""
    model, batch = zoo.build("timm_vit")
    programs = [fxpar.compile_program(model, f"dp=2,tp=2,zero={zero}", batch) for zero in (1, 2, 3)]
    assert len({str(shardings(p)) for p in programs}) == 1
    assert len({"\n".join(n.format_node() for n in p.graph.nodes) for p in programs}) == 1


@pytest.mark.parametrize("name", ["llama_tied", "nanogpt", *(pytest.param(n, marks=pytest.mark.slow) for n in (
    "resnet", "mixtral", "lstm", "deepseek_v3"))])
def test_another_signature_keeps_the_storage(name):
    model, batch = zoo.build(name)
    plan, device = Plan.parse("dp=2,tp=2,zero=3"), torch.device("cpu")
    first = compiler.compile_program(model, plan, batch)
    call = example_call(model, batch)
    halved = pytree.tree_map(lambda x: x[: len(x) // 2] if isinstance(x, torch.Tensor) and x.dim() else x, call)
    for other in (call, halved):  # of one replica: the global batch is twice as large
        second = compiler.compile_replica(model, plan, device, None, other, shardings(first))
        assert shardings(second) == shardings(first)


# ---- what cannot be ----


@pytest.mark.parametrize("plan", ["dp=4,zero=3", "dp=4,dp_replicate=2,zero=3", "dp=4,dp_replicate=4,zero=1", "dp=4"])
def test_a_batch_that_does_not_divide_is_refused(plan):
    model = nn.Linear(8, 8)
    with pytest.raises(PlanError, match=r"`dp`=4: must divide the global batch of 6.*try a batch of 8"):
        fxpar.compile_program(model, plan, (torch.randn(6, 8),))


def test_storage_that_a_call_cannot_have_is_refused():
    factors = Factors()
    rows = tuple(f for n in (3, 4) for f in factors.new(n))
    program = program_of(Mesh(("dp",), (2,), {"zero": ("dp",)}), [(factors.beside((rows,)), {})])
    other = Factors().fresh([12])
    sharding = sharding_of(other, {"dp": other[0][0]}, program.mesh)
    with pytest.raises(PlanError, match=r"`dp`=2: must divide 3.*try parallelize with an example of this call first"):
        shard_storage(program, {"p0": sharding})
