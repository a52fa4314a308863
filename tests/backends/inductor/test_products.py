"""Products whose results are added, made one: on random graphs, on graphs made by hand, and in a compiled model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, fx, nn

import fxpar
from fxpar.backends.inductor import lower as inductor
from fxpar.backends.inductor import products
from fxpar.backends.transport.base import NCCL, Transport
from tests.graphs import WAIT, Made
from tests.harness import RANDOM
from tests.processes import launch

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
MM, WIDE, CAT, WRITTEN = aten.mm.default, aten.mm.dtype, aten.cat.default, products.WRITTEN
ALL_REDUCE, SCATTER = c10d.all_reduce.default, c10d.reduce_scatter_tensor.default
GATHER = c10d.all_gather_into_tensor.default
ITEM = 8


class Runner(fx.Interpreter):
    """CPUs have no product that is written in another dtype: it is written in that of the operands."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return torch.mm(*args[:2]) if target is WIDE else super().call_function(target, args, kwargs)


class Doubles(Made):
    def tensor(self, *shape: int) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.feeds)}")
        generator = torch.Generator().manual_seed(len(self.feeds))
        node.meta["val"] = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.feeds.append(node.meta["val"])
        return node

    def do(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        values = fx.map_arg(args, lambda n: n.meta["val"])
        node.meta["val"] = torch.mm(*values[:2]).to(values[2]) if target is WIDE else target(*values)
        return node

    def run(self) -> list[Tensor]:
        return list(Runner(fx.GraphModule(nn.Module(), self.graph)).run(*self.feeds))

    def count(self, target: Any) -> int:
        return sum(n.target is target for n in self.graph.nodes)


def keeps_values(made: Doubles, transport: Transport = NCCL) -> None:
    before = made.run()
    shapes = [(n.meta["val"].shape, n.meta["val"].dtype) for n in made.graph.output_node().all_input_nodes]
    products.join_products(made.graph, transport)
    for have, want in zip(made.run(), before, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-11, atol=1e-11)
    assert [(n.meta["val"].shape, n.meta["val"].dtype) for n in made.graph.output_node().all_input_nodes] == shapes
    for node in made.graph.nodes:
        if node.target in (MM, WIDE):
            assert node.meta["val"].shape == (node.args[0].meta["val"].shape[0], node.args[1].meta["val"].shape[1])


# ---- any graph ----

LEFTS = ("input", "product", "computed", "copied", "shared")
"""What a left operand is: the last three are written into the concatenation, and "shared" ones are made of one tensor."""
SPOILS = ("", "", "", "product used", "twice", "left used", "another x", "no gradient", "other view",
          "left depends on a gradient")


@dataclass
class Case:
    """Products [m, k] @ [k, n] that are added, and those of the transposed left operands; `spoil` is done to the first one."""

    m: int
    n: int
    ks: list[int]
    lefts: list[str]
    view: list[Any]
    gradient: Any
    others: int
    spoil: str

    def expected(self) -> tuple[list[int], bool]:
        """Which products become one, and whether the gradients of the weights do."""
        group = [i for i in range(len(self.ks)) if i or self.spoil not in ("product used", "twice", "other view")]
        gradients = self.gradient is not None and self.spoil not in (
            "left used", "another x", "no gradient", "left depends on a gradient")
        free = {i for i in group if gradients and self.lefts[i] in ("computed", "copied", "shared")}
        cost = sum(self.ks[i] * self.n + (i not in free) * self.m * self.ks[i] for i in group)
        joined = len(group) > 1 and (len(group) - 1) * self.m * self.n >= cost
        return (group, gradients) if joined else ([], False)


def some_case(r: Random) -> Case:
    count = r.randint(1, 4)
    m, n = r.choice([4, 12, 24, 60]), r.choice([1, 2, 6, 12, 30])
    ks = [r.choice([1, 1, 2, 3, 6]) for _ in range(count)]
    views = [[], [(aten.reshape.default, [2, m // 2, n])], [(aten._unsafe_view.default, [2, m // 2, n])],
             [(aten.reshape.default, [2, m // 2, n]), (aten.permute.default, [1, 0, 2])]]
    lefts = [r.choice(LEFTS[2:] if r.random() < 0.6 else LEFTS) for _ in ks]
    spoil = r.choice(SPOILS)
    if count == 1 and spoil == "left depends on a gradient":
        spoil = ""
    return Case(m, n, ks, lefts, r.choice(views), r.choice([None, MM, MM, WIDE, WIDE]), r.choice([0, 0, 1, 2]), spoil)


def left_operand(made: Doubles, case: Case, i: int, base: fx.Node, gradients: list[fx.Node]) -> fx.Node:
    """base: what "shared" ones are made of."""
    m, k = case.m, case.ks[i]
    if i == 1 and gradients and case.spoil == "left depends on a gradient":
        scale = made.do(aten.sum.default, gradients[0])
        return made.do(aten.mul.Tensor, made.tensor(m, k), scale)
    if case.lefts[i] == "input":
        return made.tensor(m, k)
    if case.lefts[i] == "product":
        return made.do(MM, made.tensor(m, 2), made.tensor(2, k))
    if case.lefts[i] == "copied":
        turned = made.do(aten.permute.default, made.tensor(k, m), [1, 0])
        return made.do(aten.clone.default, turned)
    if case.lefts[i] == "shared":
        return made.do(aten.sin.default, made.do(aten.expand.default, base, [m, k]))
    return made.do(aten.reshape.default, made.do(aten.cos.default, made.tensor(m * k)), [m, k])


def build(case: Case, r: Random) -> tuple[Doubles, list[fx.Node]]:
    """The graph, its operators in any valid order; and the left operands."""
    made = Doubles()
    base, x = made.tensor(case.m, 1), made.tensor(case.m, 5)
    terms, lefts, gradients, out = [], [], [], []
    for i, k in enumerate(case.ks):
        spoil = case.spoil if i == 0 else ""
        left = left_operand(made, case, i, base, gradients)
        lefts.append(left)
        product = made.do(MM, left, made.tensor(k, case.n))
        term = product
        for target, args in case.view:
            term = made.do(target, term, args)
        if spoil == "other view":
            term = made.do(aten.permute.default, term, list(range(term.meta["val"].dim())))
        terms += [term] * (2 if spoil == "twice" else 1)
        if spoil in ("left used", "product used"):
            out.append(made.do(aten.sum.default, left if spoil == "left used" else product))
        if case.gradient is not None and spoil != "no gradient":
            of = made.tensor(case.m, 5) if spoil == "another x" else x
            turned = made.do(aten.permute.default, left, [1, 0])
            gradients.append(made.do(case.gradient, turned, of, *[torch.float32] * (case.gradient is WIDE)))
            if r.random() < 0.5:
                out.append(gradients[-1])
            else:
                out.append(made.do(aten.mul.Tensor, made.do(aten.permute.default, gradients[-1], [0, 1]), 0.5 * (i + 1)))
    terms += [made.tensor(*terms[0].meta["val"].shape) for _ in range(case.others)]
    while len(terms) > 1:
        a, b = (terms.pop(r.randrange(len(terms))) for _ in range(2))
        terms.append(made.do(aten.add.Tensor, a, b))
    made.graph.output((terms[0], made.do(aten.neg.default, terms[0]), *out))
    shuffle(made.graph, r)
    return made, lefts


def shuffle(graph: fx.Graph, r: Random) -> None:
    left = [n for n in graph.nodes if n.op == "call_function"]
    done = {n for n in graph.nodes if n.op == "placeholder"}
    while left:
        node = r.choice([n for n in left if done.issuperset(n.all_input_nodes)])
        graph.output_node().prepend(node)
        done.add(node)
        left.remove(node)
    graph.lint()


@settings(max_examples=300)
@given(RANDOM)
def test_products_are_joined_where_that_moves_no_more_bytes(r):
    case = some_case(r)
    made, lefts = build(case, r)
    before = {target: made.count(target) for target in (MM, WIDE)}
    keeps_values(made)
    group, gradients = case.expected()
    fewer = max(len(group) - 1, 0)
    assert (made.count(CAT), made.count(WRITTEN)) == ((2 - gradients, int(gradients)) if group else (0, 0)), case
    left = {target: before[target] - made.count(target) for target in (MM, WIDE)}
    want = {MM: fewer, WIDE: 0}
    want[case.gradient or MM] += fewer * gradients
    assert left == want, case
    if gradients:
        assert all([u.target for u in lefts[i].users] == [WRITTEN] for i in group)


def test_random_cases_reach_everything():
    seen = set()
    for seed in range(300):
        case = some_case(Random(seed))
        group, gradients = case.expected()
        seen |= {(case.spoil, bool(group)), (case.gradient, gradients), *((case.lefts[i], bool(group)) for i in group)}
    assert {(s, joined) for s in SPOILS for joined in (True, False)} <= seen
    assert {(g, True) for g in (MM, WIDE)} | {(left, True) for left in LEFTS} <= seen


# ---- by hand ----


def plus(made: Doubles, a: fx.Node, b: fx.Node) -> fx.Node:
    return made.do(aten.add.Tensor, a, b)


def scaled(made: Doubles, a: fx.Node, b: fx.Node) -> fx.Node:
    node = plus(made, a, b)
    node.kwargs = {"alpha": 2}
    return node


def broadcast(made: Doubles, a: fx.Node, b: fx.Node) -> fx.Node:
    return plus(made, a, made.do(aten.slice.Tensor, b, 0, 0, 1))


def added(add: Callable[[Doubles, fx.Node, fx.Node], fx.Node]) -> Doubles:
    """Two products with many rows."""
    made = Doubles()
    terms = [made.do(MM, made.tensor(60, 2), made.tensor(2, 12)) for _ in range(2)]
    made.graph.output((add(made, *terms),))
    return made


@pytest.mark.parametrize("add, left", [(plus, 1), (scaled, 2), (broadcast, 2)])
def test_only_plain_sums_are_joined(add, left):
    made = added(add)
    keeps_values(made)
    assert made.count(MM) == left


def test_the_joined_product_says_where_it_comes_from():
    made = added(plus)
    for node in made.graph.nodes:
        node.meta["nn_module_stack"] = {"q": ("model.q", nn.Linear)}
    products.join_products(made.graph)
    assert all("nn_module_stack" in n.meta for n in made.graph.nodes)


@pytest.mark.parametrize("known, left", [(False, 2), (True, 1)])
def test_parameters_that_are_gathered_into_one_are_not_copied(one_thread, known, left):
    made, terms = Doubles(), []
    for _ in range(2):
        gathered = made.do(WAIT, made.do(GATHER, made.tensor(6, 12), 1, one_thread))
        turned = made.do(aten.permute.default, made.do(aten.permute.default, gathered, [1, 0]), [1, 0])
        terms.append(made.do(MM, made.tensor(60, 6), turned))
    made.graph.output((plus(made, *terms),))
    keeps_values(made, Transport({one_thread: "copies"}) if known else NCCL)
    assert made.count(MM) == left


def projections(communicate: Any) -> Doubles:
    """The gradients of three projections' input, and of their weights, which are communicated."""
    made = Doubles()
    x, terms, out = made.tensor(60, 12), [], []
    for k in (2, 4, 6):
        left = made.do(aten.sin.default, made.tensor(60, k))
        gradient = made.do(MM, made.do(aten.permute.default, left, [1, 0]), x)
        out.append(communicate(made, gradient))
        terms.append(made.do(MM, left, made.tensor(k, 12)))
    made.graph.output((reduce(partial(plus, made), terms), *out))
    return made


def test_gradients_are_reduced_in_place_as_one(one_thread):
    """Slices of one tensor in one coalesced operator would all be copied by Inductor."""
    made = projections(lambda made, g: made.do(WAIT, made.do(ALL_REDUCE, g, "sum", one_thread)))
    keeps_values(made)
    assert [made.count(t) for t in (MM, ALL_REDUCE, WAIT)] == [2, 1, 1]
    (reduction,) = (n for n in made.graph.nodes if n.target is ALL_REDUCE)
    assert reduction.args[0].target is MM


def test_gradients_are_scattered_each_for_itself(one_thread):
    made = projections(lambda made, g: made.do(WAIT, made.do(SCATTER, g, "sum", 1, one_thread)))
    keeps_values(made)
    scatters = [n for n in made.graph.nodes if n.target is SCATTER]
    assert made.count(MM) == 2 and len(scatters) == made.count(WAIT) == 3
    assert [n.args[0].target for n in scatters] == [aten.slice.Tensor] * 3
    assert [n.args[0].meta["val"].shape[0] for n in scatters] == [2, 4, 6]  # in the order of before


# ---- a model ----


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(32))
        self.q, self.k, self.v, self.o = (nn.Linear(32, n, bias=False) for n in (32, 16, 16, 32))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.scale
        q, k, v = (f(y).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q.sin(), k.cos(), v, is_causal=True, enable_gqa=True)
        return (x + self.o(y.transpose(1, 2).flatten(2))).square().mean()


def step(rank: int, plan: str, backend: str) -> tuple[float, dict[str, Tensor], int]:
    """A step's loss and gradients, and in how many operators left operands of several products were joined."""
    joined, join = [], products.join_products

    def seen(graph: fx.Graph, **options: Any) -> None:
        join(graph, **options)
        joined.extend(n for n in graph.nodes if n.target is WRITTEN)

    torch.manual_seed(0)
    model, x = Attention(), torch.randn(8, 64, 32)
    dp = fxpar.Plan.parse(plan).dp
    with pytest.MonkeyPatch.context() as patch, torch._inductor.utils.fresh_cache():  # what is cached would not be seen
        patch.setattr(inductor.products, "join_products", seen)
        module = fxpar.parallelize(model, plan, {"x": x.chunk(dp)[rank % dp]}, backend=backend)
        loss = module(x=x.chunk(dp)[rank % dp])
        loss.backward()
    return loss.item(), {n: p.grad.full_tensor() for n, p in module.named_parameters()}, len(joined)


def same(have: tuple, want: tuple) -> None:
    assert have[0] == pytest.approx(want[0], rel=1e-6) and have[2] == 1
    for name, grad in want[1].items():
        assert (have[1][name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.slow
def test_a_model_computes_what_it_did():
    same(step(0, "dp=1", "inductor"), step(0, "dp=1", "eager"))


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("plan", ["dp=2", "tp=2", "dp=2,zero=3"])
def test_two_processes_compute_what_one_does(plan):
    want = step(0, "dp=1", "eager")
    for have in launch(2, step, plan, "inductor", timeout=300):
        same(have, want)
