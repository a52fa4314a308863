"""A backward in two: input gradients and, later, weight gradients are those of the backward as a whole and of plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Collection
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, fx, nn

from fxpar.backends import eager, stepped
from fxpar.backends.inductor.lowered import Lowered
from fxpar.backends.split import Halves, Unsplittable, split_backward
from fxpar.backends.stepped import SavedForBackward, SavedForWeightGradients, Stepped
from fxpar.backends.transport.threads import Threads
from fxpar.compat import steps
from fxpar.errors import InputError, PlanError
from fxpar.plan import Plan
from fxpar.sharding.mesh import Mesh
from tests.harness import RANDOM

aten = torch.ops.aten
ALONE = Mesh(("dp",), (1,))
Function = Callable[[list[Any]], list[Any]]
COMPILED = ["eager", "interpreted", pytest.param("compiled", marks=pytest.mark.slow)]


def program(function: Function, count: int) -> fx.GraphModule:
    """A function of a list of tensors as a flat graph."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    results = function([fx.Proxy(graph.placeholder(f"x{i}"), tracer) for i in range(count)])
    graph.output(tuple(x.node for x in results))
    return fx.GraphModule(nn.Module(), graph)


def in_steps(kind: str, function: Function, example: list[Tensor], early: Collection[int], plan: str = "dp=1") -> Stepped:
    module, parsed = program(function, len(example)), Plan.parse(plan)
    if kind == "eager":
        return eager.stepped(module, example, Threads(ALONE).runtime(0), parsed, early)
    return Lowered(ALONE, parsed, compiled=kind == "compiled").stepped(module, [example], early)[0]


def wants(*sizes: int) -> Tensor:
    return torch.randn(*sizes).requires_grad_()


def plain(function: Function, inputs: list[Tensor], grads: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor | None]]:
    """What autograd says."""
    outputs = function(inputs)
    pairs = [(x, g) for x, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
    return [x.detach() for x in outputs], [next(found) if x.requires_grad else None for x in inputs]


def same(have: list[Any], want: list[Any], like: list[Tensor], tolerance: float = 1e-5) -> None:
    """No gradient is one of zeros."""
    assert len(have) == len(want) == len(like)
    for mine, theirs, x in zip(have, want, like, strict=True):
        mine, theirs = (torch.zeros_like(x) if y is None else y for y in (mine, theirs))
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * scale)


def together(steps: Stepped, early: list[Tensor | None], late: list[Tensor | None]) -> list[Tensor | None]:
    found = dict(zip(steps.early, early, strict=True)) | dict(zip(steps.late, late, strict=True))
    return [found[i] for i in sorted(found)]


# ---- the pass ----


def halves_of(function: Function, example: list[Tensor], early: Collection[int], monkeypatch: pytest.MonkeyPatch,
              kind: str = "eager", plan: str = "dp=1") -> Halves:
    found: list[Halves] = []
    monkeypatch.setattr(stepped, "split_backward", lambda *args: found.append(split_backward(*args)) or found[-1])
    in_steps(kind, function, example, early, plan)
    return found[-1]


def targets(half: Any) -> list[Any]:
    return [n.target for n in half.module.graph.nodes if n.op == "call_function"]


def names(half: Any) -> list[str]:
    return [n.name for n in half.module.graph.find_nodes(op="placeholder")]


def mlp(inputs: list[Any]) -> list[Any]:
    x, norm, up, down, bias = inputs
    return [x + F.linear(F.gelu(F.linear(F.layer_norm(x, (8,), norm), up)), down, bias)]


def mlp_inputs() -> list[Tensor]:
    return [wants(4, 8), wants(8), wants(32, 8), wants(8, 32), wants(8)]


def test_products_of_weights_wait_and_what_only_they_read_is_no_input_of_the_first(monkeypatch):
    made = halves_of(mlp, mlp_inputs(), [0], monkeypatch)
    assert targets(made.first).count(aten.mm.default) == targets(made.second).count(aten.mm.default) == 2
    assert aten.native_layer_norm_backward.default in targets(made.first)  # makes the gradient of its weight, too
    assert [n.op for n in made.carried] == ["call_function"] * 2
    assert {aten.gelu_backward.default} < {n.target for n in made.carried}
    assert names(made.second)[-2:] == [n.name for n in made.carried]
    assert "gelu" in names(made.second) and "gelu" not in names(made.first)
    assert not set(names(made.first)) & {n.name for n in made.carried}


def test_a_sum_is_made_where_less_is_kept_for_it(monkeypatch):
    """Inductor has no operator for a layer norm's backward: its weight's gradient is a sum of a product."""
    made = halves_of(mlp, mlp_inputs(), [0], monkeypatch, "interpreted")
    assert sorted(n.meta["val"].numel() for n in made.carried) == [8, 4 * 32]
    assert aten.sum.dim_IntList in targets(made.second)  # the bias's: what it adds up is kept for a product
    assert not {aten.mul.Tensor, aten.rsqrt.default} & set(targets(made.second))


def test_a_convolution_is_taken_apart(monkeypatch):
    example = [wants(2, 3, 8), wants(4, 3, 3), wants(4)]
    made = halves_of(lambda x: [F.conv1d(x[0], x[1], x[2]).sin()], example, [0], monkeypatch)
    masks = [[n.args[-1] for n in half.module.graph.nodes if n.target is aten.convolution_backward.default]
             for half in (made.first, made.second)]
    assert masks == [[[True, False, False]], [[False, True, True]]]


def test_views_are_made_again_of_what_is_kept(monkeypatch):
    def function(inputs: list[Any]) -> list[Any]:
        x, w = inputs
        return [torch.sin(torch.reshape(F.linear(torch.cos(torch.transpose(x, 0, 1)), w), (-1,)))]

    made = halves_of(function, [wants(4, 6), wants(5, 4)], [0], monkeypatch)
    assert len(made.carried) == 1 and made.carried[0].target is aten.mul.Tensor
    assert aten.t.default in targets(made.second) or aten.view.default in targets(made.second)


def test_nothing_early_and_nothing_late(monkeypatch):
    none = halves_of(mlp, mlp_inputs(), [], monkeypatch)
    assert none.first is None and none.second.makes == [0, 1, 2, 3, 4] and none.carried == []
    all_ = halves_of(mlp, mlp_inputs(), range(5), monkeypatch)
    assert all_.second is None and all_.first.makes == none.second.makes and targets(all_.first) == targets(none.second)


def test_the_graph_that_is_split_stays_as_it_was():
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    for node in (x, y):
        node.meta["val"] = torch.ones(2)
    product = graph.call_function(aten.mul.Tensor, (x, y))
    product.meta["val"] = torch.ones(2)
    graph.output((product, None, x))
    before = str(graph)
    made = split_backward(fx.GraphModule(nn.Module(), graph), [0, 1])
    assert str(graph) == before
    assert (made.first.reads, made.first.makes, made.second.reads, made.second.makes) == ([0, 1], [0], [0], [2])


def test_a_backward_that_writes_is_refused():
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output((graph.call_function(aten.mul_.Tensor, (x, y)), y))
    module = fx.GraphModule(nn.Module(), graph)
    with pytest.raises(Unsplittable) as error:
        split_backward(module, [0])
    assert error.value.what == "operator aten.mul_.Tensor writes to an operand in the backward"
    assert split_backward(module, []).first is None


@pytest.mark.parametrize("kind", COMPILED)
def test_a_backward_that_cannot_be_split_is_whole_where_the_schedule_lets_it(kind, monkeypatch):
    inputs = mlp_inputs()
    want, grads = plain(mlp, inputs, [torch.ones(4, 8)])

    def refused(module: fx.GraphModule, early: Collection[int]) -> None:
        raise Unsplittable(next(n for n in module.graph.nodes if n.op == "call_function"), "writes to an operand")

    monkeypatch.setattr(stepped, "split_backward", refused)
    steps = in_steps(kind, mlp, inputs, [0])
    for _ in range(2):
        outputs, saved = steps.forward(*inputs)
        early, left = steps.input_gradients(saved, [torch.ones(4, 8)])
        torch.testing.assert_close([*outputs, *early, *steps.weight_gradients(left)], [*want, *grads])
    with pytest.raises(PlanError, match=r"`schedule`='zb1p': must put off.*operator aten\.\S+ writes to an operand; try .*=1f1b"):
        in_steps(kind, mlp, inputs, [0], "pp=2,microbatches=2,schedule=zb1p")


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.parametrize("function, runs", [(lambda x: [x[0].double().t() * 2], 0), (lambda x: [x[0].double().t() ** 2], 1)])
def test_what_saves_nothing_is_not_run_to_be_pulled_back(kind, function, runs, monkeypatch):
    ran: list[int] = []
    forward = Stepped.forward
    monkeypatch.setattr(Stepped, "forward", lambda self, *inputs: (ran.append(1), forward(self, *inputs))[1])
    inputs, given = [wants(3, 2)], torch.randn(2, 3, dtype=torch.float64)
    found = in_steps(kind, function, inputs, []).pull_back(inputs, [given])
    torch.testing.assert_close(found, plain(function, inputs, [given])[1])
    assert len(ran) == runs


@pytest.mark.parametrize("kind", COMPILED)
def test_a_program_that_writes_to_its_inputs_is_refused(kind):
    def function(x: list[Any]) -> list[Any]:
        return [torch.ops.aten.add_.Tensor(x[1], x[0])]

    with pytest.raises(PlanError, match=r"`pp`=2.*operator aten\.add_\.Tensor writes to an input of its stage; try pp=1"):
        in_steps(kind, function, [wants(3), torch.zeros(3)], [0], "pp=2,microbatches=2")


# ---- steps ----


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_microbatches_in_flight(kind, recompute):
    """Whatever the order of their steps, each has its own gradients: nothing that one needs is overwritten."""
    torch.manual_seed(0)
    params = mlp_inputs()[1:]
    params[0].requires_grad_(False)
    batches = [[wants(4, 8), *params] for _ in range(5)]
    for _ in range(2):  # compiled, and found again
        steps = in_steps(kind, mlp, batches[0], [0], f"dp=1,recompute={recompute}")
    grads = [torch.randn(4, 8) for _ in batches]
    r, state, found = Random(3), {i: ("start", None) for i in range(5)}, {}
    while state:
        i = r.choice(list(state))
        done, value = state.pop(i)
        if done == "start":
            outputs, saved = steps.forward(*batches[i])
            assert isinstance(saved, SavedForBackward) and not outputs[0].requires_grad
            torch.testing.assert_close(outputs, plain(mlp, batches[i], [grads[i]])[0])
            state[i] = "forward", saved
        elif done == "forward" and i == 4:
            found[i] = steps.backward(value, [grads[i]])
        elif done == "forward":
            kept = [(x, x.clone()) for x in value.tensors or []]
            early, left = steps.input_gradients(value, [grads[i]])
            assert isinstance(left, SavedForWeightGradients)
            still = [(x, before) for x, before in kept if any(x is y for y in left.tensors or [])]
            assert still and all(torch.equal(x, before) for x, before in still)
            state[i] = "input", (early, [g.clone() for g in early], left)
        else:
            early, before, left = value
            torch.testing.assert_close(early, before, rtol=0, atol=0)
            found[i] = together(steps, early, steps.weight_gradients(left))
            torch.testing.assert_close(early, before, rtol=0, atol=0)
    for i, batch in enumerate(batches):
        same(found[i], plain(mlp, batch, [grads[i]])[1], batch)
        assert found[i][1] is None  # frozen


@pytest.mark.parametrize("kind", COMPILED)
def test_outputs_without_gradients_and_that_are_inputs(kind):
    def function(inputs: list[Any]) -> list[Any]:
        x, skip, w, ids, constant = inputs
        y = F.linear(x, w).tanh()
        return [y, skip, torch.transpose(skip, 0, 1), y, torch.reshape(y, (-1,)), ids, ids + 1, constant.cos(), y.sum(0), w]

    torch.manual_seed(0)
    inputs = [wants(4, 3), wants(2, 5), wants(3, 3), torch.arange(3), torch.randn(3)]
    for early in ([0, 1], [1], [2, 3]):
        steps = in_steps(kind, function, inputs, early)
        assert steps.roots == (0, 1, 2, 3, 4, 8, 9) and steps.early == tuple(early)
        outputs, saved = steps.forward(*inputs)
        want = function(inputs)
        torch.testing.assert_close(outputs, [x.detach() for x in want])
        grads = [torch.randn(3, 4).t(), torch.randn(2, 5), None, torch.randn(4, 3), torch.randn(12), None, None, None,
                 torch.ones(()).expand(3), torch.randn(3, 3)]
        first, left = steps.input_gradients(saved, grads)
        same(together(steps, first, steps.weight_gradients(left)), plain(function, inputs, grads)[1], inputs)


def test_nothing_wants_a_gradient():
    inputs = [torch.randn(4, 8).requires_grad_(False) for _ in range(2)]
    steps = in_steps("eager", lambda x: [x[0] * x[1]], inputs, [0])
    outputs, saved = steps.forward(*inputs)
    assert torch.equal(outputs[0], inputs[0] * inputs[1]) and saved.tensors == []
    assert steps.backward(saved, [None]) == [None, None] and steps.carried() == []


@pytest.mark.parametrize("kind", ["eager", "interpreted"])
def test_a_program_says_itself_what_is_cast(kind):
    inputs = mlp_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        steps = in_steps(kind, mlp, inputs, [0])
        (y,), saved = steps.forward(*inputs)
        found = steps.backward(saved, [torch.ones(4, 8)])
    want, grads = plain(mlp, inputs, [torch.ones(4, 8)])
    same([y, *found], [*want, *grads], [y, *inputs])


def test_what_is_not_right_is_said():
    inputs = mlp_inputs()
    steps, other = in_steps("eager", mlp, inputs, [0]), in_steps("eager", mlp, inputs, [0])
    _, saved = steps.forward(*inputs)
    with pytest.raises(InputError, match="to another program"):
        other.backward(saved, [None])
    with pytest.raises(InputError, match="2 gradients were given for 1 outputs"):
        steps.backward(saved, [None, None])
    with pytest.raises(InputError, match=r"gradient of output 0 is torch.float32 \[4\]"):
        steps.backward(saved, [torch.ones(4)])
    with pytest.raises(InputError, match=r"float64"):
        steps.backward(saved, [torch.ones(4, 8, dtype=torch.float64)])
    _, left = steps.input_gradients(saved, [torch.ones(4, 8)])
    with pytest.raises(InputError, match="used twice"):
        steps.input_gradients(saved, [torch.ones(4, 8)])
    steps.weight_gradients(left)
    with pytest.raises(InputError, match="used twice"):
        steps.weight_gradients(left)
    with pytest.raises(InputError, match=r"inputs \[7\] come first, and there are 5"):
        in_steps("eager", mlp, inputs, [7])
    constant = in_steps("eager", lambda x: [x[0] * 2, x[1].cos()], [wants(3), torch.ones(3)], [0])
    with pytest.raises(InputError, match="output 1 depends on no input that wants a gradient"):
        constant.backward(constant.forward(wants(3), torch.ones(3))[1], [None, torch.ones(3)])


def test_what_the_second_half_reads_is_not_overwritten_by_the_first(monkeypatch):
    told: list[tuple[set[str], set[str]]] = []
    make_halves = stepped._make_halves

    def seen(backward: Any, halves: Halves, like: list[Tensor], donated: list[int], make: Any) -> None:
        def telling(module: fx.GraphModule, values: list[Tensor], free: list[int], gradients: int) -> Any:
            given = [n.name for n in module.graph.find_nodes(op="placeholder")]
            told.append((set(given), {given[i] for i in free}))
            return make(module, values, free, gradients)

        make_halves(backward, halves, like, donated, telling)

    monkeypatch.setattr(stepped, "_make_halves", seen)
    for early in ((), [0]):
        in_steps("interpreted", mlp, mlp_inputs(), early)
    (_, whole), (first, by_first), (second, by_second) = told
    assert whole and by_first and by_second and not by_first & by_second
    assert by_first == (whole & first) - second and by_second == whole & second


def test_what_was_compiled_is_found_by_what_it_may_overwrite(monkeypatch):
    """Inductor does not ask what a graph may overwrite when it looks for one that it compiled before."""
    keys: list[bytes | None] = []

    def inner(graph: fx.GraphModule, example: Any, **options: Any) -> Any:
        mark = torch._inductor.config.post_grad_custom_pre_pass
        keys.append(mark and mark.uuid())
        return steps.output_code(len)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", inner)
    for early in ((), [0], [0]):
        in_steps("compiled", mlp, mlp_inputs(), early)
    assert [key is None for key in keys] == [True, False, *[True, False, False] * 2]  # forwards, and parts of backwards
    assert keys[2:5] == keys[5:] and len({keys[1], *keys[3:5]}) == 3


def test_what_waits_is_listed():
    steps = in_steps("eager", mlp, mlp_inputs(), [0])
    listed = {(c.kind, c.shape): c.nbytes for c in steps.carried()}
    assert listed == {("saved", (4, 8)): 128, ("saved", (4, 32)): 512, ("given", (4, 8)): 128, ("made", (4, 32)): 512,
                      ("made", (8,)): 32}
    _, saved = steps.forward(*mlp_inputs())
    _, left = steps.input_gradients(saved, [torch.ones(4, 8)])
    assert [tuple(x.shape) for x in left.tensors] == [c.shape for c in steps.carried()]


# ---- any program ----


WIDTH = 8
OPERATORS = ("linear", "ffn", "norm", "rms", "act", "scale", "skip", "embed", "conv", "attention", "split")
"""What a stage is made of."""
Parameter = Callable[..., int]
"""Takes the sizes of one; the place of such a parameter among the inputs of a stage."""


def operator(kind: str, parameter: Parameter) -> Callable[[Any, list[Any]], Any]:
    """A function of an activation and all inputs of the stage."""
    if kind == "linear":
        w, b = parameter(WIDTH, WIDTH), parameter(WIDTH)
        return lambda h, x: F.linear(h, x[w], x[b])
    if kind == "ffn":
        up, down = parameter(16, WIDTH), parameter(WIDTH, 16)
        return lambda h, x: h + F.linear(F.gelu(F.linear(h, x[up])), x[down])
    if kind == "norm":
        w, b = parameter(WIDTH), parameter(WIDTH)
        return lambda h, x: F.layer_norm(h, (WIDTH,), x[w], x[b])
    if kind == "rms":
        w = parameter(WIDTH)
        return lambda h, x: h * torch.rsqrt(torch.mean(h * h, -1, True) + 0.1) * x[w]
    if kind == "scale":
        w = parameter(WIDTH)
        return lambda h, x: h * x[w]
    if kind == "embed":
        table = parameter(5, WIDTH)
        return lambda h, x: h + F.embedding(x[2], x[table])
    if kind == "conv":
        w = parameter(WIDTH, WIDTH, 3)
        return lambda h, x: torch.transpose(F.conv1d(torch.transpose(h, 1, 2), x[w], padding=1), 1, 2)
    if kind == "attention":
        w = parameter(3 * WIDTH, WIDTH)
        return lambda h, x: h + attended(F.linear(h, x[w]))
    if kind == "split":
        return lambda h, x: torch.cat([torch.chunk(h, 2, 2)[1].sin(), torch.chunk(h, 2, 2)[0] * 2], 2)
    return (lambda h, x: torch.tanh(h)) if kind == "act" else lambda h, x: h + x[1]


def attended(fused: Any) -> Any:
    """Causal attention of two heads, of queries, keys and values in one."""
    qkv = torch.chunk(torch.reshape(fused, (2, 6, 3, 2, WIDTH // 2)), 3, 2)
    q, k, v = (torch.transpose(torch.squeeze(qkv[i], 2), 1, 2) for i in range(3))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return torch.reshape(torch.transpose(mixed, 1, 2), (2, 6, WIDTH))


def random_stage(r: Random) -> tuple[Function, list[Tensor]]:
    """A stage of a pipeline: two activations, token ids, and parameters, some of which are frozen or used twice."""
    torch.manual_seed(r.getrandbits(31))
    inputs = [wants(2, 6, WIDTH), torch.randn(2, 6, WIDTH).requires_grad_(r.random() < 0.7), torch.randint(5, (2, 6))]

    def parameter(*sizes: int) -> int:
        again = [i for i, x in enumerate(inputs) if i > 2 and x.shape == sizes]
        if again and r.random() < 0.3:
            return r.choice(again)
        inputs.append((torch.randn(*sizes) / 2).requires_grad_(r.random() < 0.8))
        return len(inputs) - 1

    layers = [operator(r.choice(OPERATORS), parameter) for _ in range(r.randint(1, 6))]
    tap, more = r.randrange(len(layers)), r.sample(["skip", "tap", "loss", "view", "ids", "weight"], r.randint(0, 3))

    def function(x: list[Any]) -> list[Any]:
        h = tapped = x[0]
        for i, layer in enumerate(layers):
            h = layer(h, x)
            tapped = h if i == tap else tapped
        extra = {"skip": x[1], "tap": tapped, "loss": (h * h).mean(), "view": torch.transpose(h, 0, 1), "ids": x[2],
                 "weight": x[-1]}
        return [h, *(extra[name] for name in more)]

    return function, inputs


def check_stage(r: Random, kind: str) -> None:
    function, inputs = random_stage(r)
    early = r.choice([[0], [0, 1], [0, 1], r.sample(range(len(inputs)), r.randint(0, len(inputs)))])
    plan = f"dp=1,recompute={r.choice(['none', 'none', 'full', '0.5'])}"
    steps, whole = (in_steps(kind, function, inputs, chosen, plan) for chosen in (early, ()))
    outputs = function(inputs)
    grads = [torch.randn_like(x) if i in steps.roots and r.random() < 0.8 else None for i, x in enumerate(outputs)]
    if outputs[0].requires_grad:
        grads[0] = torch.randn_like(outputs[0])
    have, saved = steps.forward(*inputs)
    torch.testing.assert_close(have, [x.detach() for x in outputs], rtol=1e-5, atol=1e-5)
    first, left = steps.input_gradients(saved, grads)
    assert left.tensors is not None and len(left.tensors) == len(steps.carried())
    found = together(steps, first, steps.weight_gradients(left))
    same(found, whole.backward(whole.forward(*inputs)[1], grads), inputs, 1e-6)
    if any(g is not None for g in grads):
        same(found, plain(function, inputs, grads)[1], inputs)


@given(RANDOM)
@settings(max_examples=2)
def test_random_stages(r):
    check_stage(r, r.choice(["eager", "interpreted"]))


@pytest.mark.slow
@given(RANDOM)
@settings(max_examples=100)
def test_many_random_stages(r):
    check_stage(r, r.choice(["eager", "interpreted"]))


@pytest.mark.slow
@given(RANDOM)
@settings(max_examples=6)
def test_random_compiled_stages(r):
    check_stage(r, "compiled")
