"""Typed collectives: `typed` reads what was made; the table of conjugates is what a backward pass really communicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx

import fxpar
from fxpar.backends import simulate
from fxpar.ops import collectives
from fxpar.ops.collectives import CONJUGATE, Collective, differs_along, make, typed
from fxpar.ops.runtime import LoneRuntime, axis_index, use_runtime
from fxpar.sharding.mesh import Mesh
from tests import zoo

MESH = Mesh(("a", "b"), (2, 3))
BF16, FP64 = torch.bfloat16, torch.float64
X = fx.Graph().placeholder("x")
COLLECTIVES = {
    "psum": Collective("psum", X, ("a", "b")),
    "pmax": Collective("pmax", X, ("a",)),
    "vary": Collective("vary", X, ("a", "b")),
    "average": Collective("average", X, ("a",)),
    "all_gather": Collective("all_gather", X, ("b",), (1, 2)),
    "all_gather_varying": Collective("all_gather_varying", X, ("b",), (1, 1)),
    "reduce_scatter": Collective("reduce_scatter", X, ("b",), (0, 2)),
    "shard": Collective("shard", X, ("a",), (1, 1)),
    "all_to_all": Collective("all_to_all", X, ("b",), (0, 1), (1, 2)),
}
WITH_OPTIONS = [
    Collective("vary", X, ("a",), reduce=BF16),
    Collective("vary", X, ("a",), unreduced=X),
    Collective("average", X, ("a",), unreduced=X),
    Collective("all_gather", X, ("a",), (1, 1), dtype=BF16),
    Collective("all_gather_varying", X, ("a",), (1, 1), reduce=BF16),
    Collective("all_gather_varying", X, ("a",), (1, 1), dtype=BF16, reduce=FP64, unsharded=X, unreduced=X),
]


def one_node(made: Collective) -> tuple[fx.Graph, fx.Node]:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = make(graph, Collective(**{**vars(made), "value": x}))
    graph.output((node,))
    return graph, node


# ---- reading and making ----


@pytest.mark.parametrize("made", [*COLLECTIVES.values(), *WITH_OPTIONS], ids=str)
def test_what_was_made_is_read(made):
    node = make(X.graph, made)
    assert typed(node) == made
    assert made.ranks(MESH) == {"a": 2, "b": 3, "ab": 6}["".join(made.axes)]
    assert made.operand_bytes(12, MESH) == 12 * {"all_gather": 1 / made.ranks(MESH), "all_gather_varying": 1 / made.ranks(MESH),
                                                 "reduce_scatter": 3, "shard": 2}.get(made.kind, 1)  # fmt: skip


def test_there_is_one_of_every_kind():
    assert set(COLLECTIVES) == set(CONJUGATE)


@pytest.mark.parametrize("target, args, kwargs, read", [
    (collectives.psum, (X, ("a",)), {}, Collective("psum", X, ("a",))),
    (collectives.pmax, (X, ("a",)), {}, Collective("pmax", X, ("a",))),
    (collectives.vary, (X, ("a",), BF16), {"unreduced": X}, Collective("vary", X, ("a",), reduce=BF16, unreduced=X)),
    (collectives.average, (X, ("a",)), {"unreduced": X}, Collective("average", X, ("a",), unreduced=X)),
    (collectives.all_gather, (X, ("a",), 1), {}, Collective("all_gather", X, ("a",), (1, 1))),
    (collectives.all_gather, (X, ("a",), 1, 2, True, BF16), {"unsharded": X},
     Collective("all_gather_varying", X, ("a",), (1, 2), dtype=BF16, unsharded=X)),
    (collectives.all_gather, (X, ("a",)), {"dim": 1, "varying": True, "reduce": BF16},
     Collective("all_gather_varying", X, ("a",), (1, 1), reduce=BF16)),
    (collectives.reduce_scatter, (X, ("a",), 1), {"outer": 2}, Collective("reduce_scatter", X, ("a",), (1, 2))),
    (collectives.shard, (X, ("a",), 1), {}, Collective("shard", X, ("a",), (1, 1))),
    (collectives.all_to_all, (X, ("a",), 1, 2, 3, 4), {}, Collective("all_to_all", X, ("a",), (1, 2), (3, 4))),
])  # fmt: skip
def test_arguments_are_read_by_position_and_by_name(target, args, kwargs, read):
    assert typed(X.graph.call_function(target, args, kwargs)) == read


def test_what_is_no_collective_is_not_read():
    graph = fx.Graph()
    x = graph.placeholder("psum")
    nodes = [x, graph.get_attr("psum"), graph.call_function(torch.add, (x, x)), graph.output((x,)),
             graph.call_function(axis_index, (("a",),))]  # fmt: skip
    assert [typed(n) for n in nodes] == [None] * 5
    assert [differs_along(n) for n in nodes] == [None] * 4 + [("a",)]


def test_what_ranks_do_differently():
    assert {k for k, made in COLLECTIVES.items() if differs_along(make(X.graph, made))} == {"all_gather", "shard"}


def test_what_a_backward_sums():
    assert {k for k, made in COLLECTIVES.items() if made.sums} == {"vary", "average", "all_gather_varying"}
    assert {k for k, made in COLLECTIVES.items() if made.varies} == {"vary", "all_gather_varying"}
    assert {k for k, made in COLLECTIVES.items() if not made.returns_alike} == {"psum", "pmax"}
    assert {k for k, made in COLLECTIVES.items() if made.gathers} == {"all_gather", "all_gather_varying"}


# ---- what is communicated ----


@pytest.fixture
def sent(monkeypatch) -> Iterator[Counter[str]]:
    """How often groups of simulated ranks communicated, by what; a maximum is an all-reduce."""
    seen: Counter[str] = Counter()
    for kind, real in list(simulate._COMM.items()):

        def watched(xs, real=real, name="all_reduce" if kind == "max" else kind):
            seen[name] += 1
            return real(xs)

        monkeypatch.setitem(simulate._COMM, kind, watched)
    return seen


@pytest.mark.parametrize("kind", CONJUGATE)
def test_simulated_ranks_communicate_what_the_table_says(kind, sent):
    made, groups = COLLECTIVES[kind], len(MESH.groups(COLLECTIVES[kind].axes))
    graph, _ = one_node(made)
    xs = [torch.randn(12, 12, requires_grad=True) for _ in range(MESH.world_size)]
    outs = [o[0] for o in simulate.run(fx.GraphModule(torch.nn.Module(), graph), MESH, [[x] for x in xs])]
    assert sent == ({made.forward.comm: groups} if made.forward.comm else {})
    assert {made.operand_bytes(o.nbytes, MESH) for o in outs} == {xs[0].nbytes}
    sent.clear()
    if made.backward is None:
        assert not any(o.requires_grad for o in outs)
    else:
        grads = torch.autograd.grad(outs, xs, [torch.randn_like(o) for o in outs])
        assert sent == ({made.backward.comm: groups} if made.backward.comm else {})
        assert all(g.shape == x.shape for g, x in zip(grads, xs, strict=True))


class Recorded(LoneRuntime):
    """A runtime of one rank that notes what it is asked to send, and the bytes that this leaves."""

    def __init__(self) -> None:
        super().__init__({"a": 2, "b": 3})
        self.sent: list[str] = []
        self.left: list[int] = []

    def noted(self, kind: str, result: Tensor) -> Tensor:
        self.sent.append(kind)
        self.left.append(result.nbytes)
        return result

    def all_reduce(self, x: Tensor, axes: tuple[str, ...], op: str = "sum") -> Tensor:
        return self.noted("all_reduce", super().all_reduce(x, axes, op))

    def all_gather(self, x: Tensor, axes: tuple[str, ...]) -> Tensor:
        return self.noted("all_gather", super().all_gather(x, axes))

    def reduce_scatter(self, x: Tensor, axes: tuple[str, ...]) -> Tensor:
        return self.noted("reduce_scatter", super().reduce_scatter(x, axes))

    def all_to_all(self, x: Tensor, axes: tuple[str, ...]) -> Tensor:
        return self.noted("all_to_all", super().all_to_all(x, axes))


@pytest.mark.parametrize("dtype, reduce", [(None, None), (torch.bfloat16, None), (torch.bfloat16, torch.bfloat16)])
def test_a_backward_leaves_the_bytes_that_are_told(dtype, reduce):
    made, runtime = Collective("all_gather_varying", X, ("a",), dtype=dtype, reduce=reduce), Recorded()
    x = torch.randn(12, 12, requires_grad=True)
    with use_runtime(runtime):
        (y,) = fx.GraphModule(torch.nn.Module(), one_node(made)[0])(x)
        y.backward(torch.ones_like(y))
    assert runtime.left == [y.nbytes, made.backward_bytes(y.nbytes, x.dtype, MESH)]
    assert runtime.left[1] == 12 * 12 * (2 if reduce else 4)


@pytest.mark.parametrize("kind", CONJUGATE)
def test_a_rank_communicates_what_the_table_says(kind):
    made, runtime = COLLECTIVES[kind], Recorded()
    graph, _ = one_node(made)
    x = torch.randn(12, 12, requires_grad=True)
    with use_runtime(runtime):
        (y,) = fx.GraphModule(torch.nn.Module(), graph)(x)
    assert runtime.sent == [s for s in [made.forward.comm] if s]
    runtime.sent.clear()
    assert y.requires_grad == (made.backward is not None)
    if made.backward is not None:
        (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
        assert runtime.sent == [s for s in [made.backward.comm] if s]
        assert grad.shape == x.shape


def test_a_backward_keeps_no_operand():
    """What a collective does is kept for its backward, its operand is not."""
    x = torch.randn(12, 12, requires_grad=True)
    with use_runtime(Recorded()):
        y = collectives.all_gather(x, ("a",), 0, varying=True)
    made = y.grad_fn.made
    assert (made.value, made.unsharded, made.unreduced) == (None, None, None) and y.grad_fn.saved_tensors == (None,)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("plan", ["dp=2", "tp=2", "dp=2,zero=3", "dp=2,tp=2,zero=3"])
def test_a_report_counts_what_a_simulated_step_communicates(name, plan, sent):
    """All but zero=3's gathers for the backward pass: a simulated step keeps what it gathered."""
    model, batch = zoo.build(name)
    simulation = fxpar.simulate(model, plan, batch)
    sent.clear()
    simulation.step(**batch)
    report = fxpar.report.report.report_of(simulation.program)
    expected: Counter[str] = Counter()
    for row in report.collectives:
        if (row.kind, row.phase, row.strategy) == ("all_gather", "backward", "zero"):
            continue
        expected[row.kind] += row.count * len(simulation.program.mesh.groups(row.axes))
    assert sent == expected
