"""`assert_equivalent`: a model under a plan against the plain model, value by value where they differ."""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxpar.backends.eager import run_flat
from fxpar.backends.inductor.lower import graph_passes
from fxpar.backends.simulate import Lockstep
from fxpar.compiler import Captured, capture
from fxpar.errors import EquivalenceError
from fxpar.model.hugging_face import as_trained
from fxpar.model.inputs import Call
from fxpar.model.inputs import leaves as input_leaves
from fxpar.ops.vocabulary import DRAWN
from fxpar.passes.strategies.prologue import joined, part_of
from fxpar.plan import Plan, Plans
from fxpar.program import Program, user_line
from fxpar.progress import stage
from fxpar.sharding.facts import full_value, global_value, local_value, sharding_at
from fxpar.sharding.layout import Piece, Sharding, put
from fxpar.verify.simulation import Simulation
from fxpar.verify.step import SimulatedStep, StepResult, scalar_of, unflatten

LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5
FARTHER = 1.5
"""How much farther from the model a plan in fewer bits may be than one device in them."""
DRAWS = 5
"""Over how many draws of roundings distances are taken where one seems too far."""
NOISE = 1e-7
"""What is zero but for rounding is compared to this much of the largest parameter gradient, or buffer."""
ROUNDING = 3
"""How many times its norm on one device a gradient that is zero in float64 may be off: it is all rounding."""


@dataclass
class Reference:
    """The plain model's step. `loss` and `grads` as in `fxpar.verify.step.StepResult`. is_zero: whether a parameter's gradient is
    zero but for rounding, as that of a bias before a batch norm is. rounding: how far the loss moves where each parameter moves
    by a rounding of its own: more than the tolerance where what the loss adds up cancels."""

    loss: Tensor
    grads: dict[str, Tensor]
    input_grads: dict[str, Tensor]
    buffers: dict[str, Tensor]
    is_zero: Callable[[str], bool] = lambda name: False
    rounding: Callable[[], float] = lambda: 0.0


def assert_equivalent(model: nn.Module | Captured, plan: Plan | str | Plans, example_inputs: Any = None, *,
                      lowered: bool = False, backend: str = "eager", transport: str = "auto",
                      loss_tolerance: float = LOSS_TOLERANCE, gradient_tolerance: float = GRADIENT_TOLERANCE,
                      seed: int = 0) -> None:
    """Check that `model` under `plan` computes what `model` computes.

    model: may be what `fxpar.capture` made of one and of its inputs. plan: one, or several, each of which is checked; the model
    is captured once for all of them.

    Runs every rank in this process on the *global* batch `example_inputs` (a dict of keyword arguments, or a tuple),
    in the mode the model is in. Compares the loss (relative to it), every gradient (relative, in norm), and the
    buffers that the model updates. A model without a loss is compared through `step.scalar_of` its outputs. With
    dropout on, the reference is the captured model on one device with the same counter-based masks. Under a plan with
    microbatches it is the whole batch, too; but where the report notes that the model is not linear in microbatches, it is the
    same microbatches on one device.

    Where the plan computes in fewer bits than the model has (`param_dtype`, `reduce_dtype`), what it computes may be no farther
    from the model than 1.5 times what one device computes in them. Both distances are random, as roundings are; where the first
    ones seem too far, they are taken over `DRAWS` draws, in each of which the parameters are moved by one rounding.

    loss_tolerance, gradient_tolerance: how far the loss, and each gradient, may be from the model's, as a part of it, where the
    plan computes in the model's dtypes. seed: what dropout draws from. lowered, backend, transport: see `fxpar.simulate`. With
    lowered=True the forward and backward graphs are compared that the inductor backend hands over, with backend="inductor" what
    it makes of them.
    Raises: `EquivalenceError` that names the gradient or loss, the first value of the program that differs, its
    layout, the line of the model that made it, and the pass after which it differs.
    """
    captured = model if isinstance(model, Captured) else capture(model, example_inputs)
    for each in [plan] if isinstance(plan, Plan | str) else plan:
        _assert_equivalent(captured, Plan.of(each), lowered, backend, transport, loss_tolerance, gradient_tolerance, seed)


def _assert_equivalent(captured: Captured, plan: Plan, lowered: bool, backend: str, transport: str, loss_tolerance: float,
                       gradient_tolerance: float, seed: int) -> None:
    inferred = _Inferred()
    simulation = Simulation(captured, plan, observe=inferred, lowered=lowered, backend=backend, transport=transport)
    model, call = captured.model, captured.call
    with torch.random.fork_rng(devices=[]):
        inputs = input_leaves(call)

        def draw(number: int) -> tuple[Reference, Reference, StepResult]:
            with stage("running the plain model"), moved(model, number), _buffers_put_back(model):
                if _is_estimated(simulation.program):
                    exact = _in_microbatches(captured, plan, False, seed)
                    one = _in_microbatches(captured, plan, True, seed) if _is_narrow(plan) else exact
                else:
                    exact = _exact(model, plan, call, inferred.program, seed)
                    one = _run_program(inferred.program, model, inputs, seed) if _is_narrow(plan) else exact
            with moved(model, number):
                return exact, _rounded(one, plan), simulation.step(*call[0], **call[1], seed=seed)

        exact, one, result = draw(0)
        if not _is_narrow(plan):
            compare = functools.partial(_first_difference, exact, loss_tolerance=loss_tolerance,
                                        gradient_tolerance=gradient_tolerance)
            problem = compare(result)
        else:
            compare = functools.partial(_too_far, exact, one)
            apart = [_apart(exact, one, result)]
            if (problem := compare(result)) is not None and too_far(apart):
                apart += [_apart(*draw(number)) for number in range(1, DRAWS)]
                problem = too_far(apart)
        if problem is not None and plan.pp > 1:
            unstaged = replace(plan, pp=1, virtual_stages=1, stage_boundaries=(), schedule="1f1b")
            _assert_equivalent(captured, unstaged, True, backend, transport, loss_tolerance, gradient_tolerance, seed)
            raise EquivalenceError(f"{problem}; with pp=1 it agrees: the cut into stages or their schedule makes the "
                                   f"difference; plan {plan}")
        if problem is not None and simulation.lowered:
            raise EquivalenceError(_explain_lowered(problem, simulation, seed, compare))
        if problem is not None and plan.microbatches > 1:
            _assert_equivalent(captured, replace(plan, microbatches=1), lowered, backend, transport, loss_tolerance,
                               gradient_tolerance, seed)
            raise EquivalenceError(f"{problem}; with microbatches=1 it agrees: the pass 'microbatches' makes the difference; "
                                   f"plan {plan}")
        if problem is not None:
            raise EquivalenceError(_explain(problem, simulation, inferred.program, seed, compare))


@contextlib.contextmanager
def moved(model: nn.Module, draw: int, dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Inside, the model's parameters are moved by about a rounding of `dtype`; draw 0 does not move them."""
    if not draw:
        yield
        return
    before = {p: p.detach().clone() for p in model.parameters()}
    generator = torch.Generator().manual_seed(draw)
    try:
        with torch.no_grad():
            for p in model.parameters():
                if p.is_floating_point():
                    noise = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
                    p.mul_(1 + torch.finfo(dtype).eps * noise)
        yield
    finally:
        with torch.no_grad():
            for p, value in before.items():
                p.copy_(value)


def _exact(model: nn.Module, plan: Plan, call: Call, program: Program, seed: int) -> Reference:
    """One device, in the dtypes that the model has. program: what is inferred under `plan`."""
    if not any(s.kind == "seed" for s in program.sources):
        return _with_roundings(_run_model(model, call), model, call)
    if not _is_narrow(plan):
        return _run_program(program, model, input_leaves(call), seed)
    wide = _Inferred()
    Simulation(model, replace(plan, param_dtype=None, reduce_dtype=None, microbatches=1), call[1] or call[0], observe=wide)
    return _run_program(wide.program, model, input_leaves(call), seed)


def _with_roundings(reference: Reference, model: nn.Module, call: Call) -> Reference:
    """`reference` of a model in float32, which runs in float64 once it is asked what is zero, and again for what rounds."""
    @functools.cache
    def precise() -> dict[str, Tensor]:
        wide, inputs = copy.deepcopy((model, call))
        try:
            return _run_model(wide.double(), pytree.tree_map_only(Tensor, _widened, inputs)).grads
        except RuntimeError:  # it makes float32 values of its own
            return {}

    def is_zero(name: str) -> bool:
        return name in precise() and bool(precise()[name].norm() <= GRADIENT_TOLERANCE * reference.grads[name].norm())

    @functools.cache
    def rounding() -> float:
        apart = []
        for number in range(1, DRAWS):
            with moved(model, number, torch.float32), _buffers_put_back(model):
                apart.append((_run_model(model, call).loss - reference.loss).abs().item())
        return max(apart)

    return replace(reference, is_zero=is_zero, rounding=rounding)


def _widened(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t


@contextlib.contextmanager
def _buffers_put_back(model: nn.Module) -> Iterator[None]:
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for n, b in model.named_buffers():
                b.copy_(buffers[n])


def _is_estimated(program: Program) -> bool:
    """Whether what is compared depends on values that each microbatch estimates from its own rows."""
    step, sinks = program.microbatches, program.tensor_sinks()
    if step is None:
        return False
    outputs = [torch.zeros(full_value(n).shape, dtype=full_value(n).dtype) for n in program.outputs()]
    loss = scalar_of(unflatten(program, outputs))
    own = [k for k, out in enumerate(outputs) if out is loss] or range(len(outputs))
    return not all(step.exact[k] for k, sink in enumerate(sinks) if k in own or sink.kind == "buffer")


def _in_microbatches(captured: Captured, plan: Plan, narrow: bool, seed: int) -> Reference:
    """One device that runs the microbatches of a plan, each of which has rows of every replica. narrow: in the plan's dtypes."""
    alone = Plan(microbatches=plan.microbatches, outputs=plan.outputs, batch_dims=plan.batch_dims, roles=plan.roles)
    program = captured.partition(
        replace(alone, param_dtype=plan.param_dtype, reduce_dtype=plan.reduce_dtype) if narrow else alone)
    _deal(program, plan.dp)
    made = SimulatedStep(captured.model, program, Lockstep(program.mesh), input_leaves(captured.call), seed).run()
    return Reference(made.loss, made.grads, made.input_grads, made.buffers)


def _deal(program: Program, replicas: int) -> None:
    """Have the program of a microbatch take some of each replica's rows, and draw their dropout."""
    step = program.microbatches
    assert step is not None

    def dealt(sharding: Sharding) -> Sharding:
        return tuple(tuple(p for piece in dim for p in (
            (Piece(replicas), Piece(piece.size // replicas, piece.axes)) if piece.axes else (piece,))) for dim in sharding)

    program.microbatches = replace(step, rows={k: dealt(t) for k, t in step.rows.items()},
                                   output_rows={k: dealt(t) for k, t in step.output_rows.items()})
    for graph in [program.graph, *([] if step.prologue is None else [step.prologue.graph])]:
        for node in graph.nodes:
            if node.target in (joined, part_of):
                node.update_arg(2, node.args[2] * replicas)
            elif node.target in DRAWN:
                grid = [[r for run in runs for r in _dealt_run(graph, run, replicas)] for runs in node.kwargs["grid"]]
                node.update_kwarg("grid", tuple(map(tuple, grid)))


def _dealt_run(graph: fx.Graph, run: tuple[int, Any, int], replicas: int) -> list[tuple[int, Any, int]]:
    """A run of elements that begins at a multiple of its length, as so many of each replica."""
    local, offset, full = run
    if not isinstance(offset, fx.Node):
        return [run]
    with graph.inserting_after(offset):
        mine = graph.call_function(operator.floordiv, (offset, replicas))
    return [(replicas, 0, replicas), (local // replicas, mine, full // replicas)]


def _is_narrow(plan: Plan) -> bool:
    return any(d is not None and d.itemsize < 4 for d in (plan.param_dtype, plan.reduce_dtype))


def _rounded(one: Reference, plan: Plan) -> Reference:
    """As if one device had reduced its gradients."""
    dtype = plan.reduce_dtype or torch.float32
    return replace(one, grads={n: g.to(dtype).to(g.dtype) for n, g in one.grads.items()})


def _too_far(exact: Reference, one: Reference, result: StepResult) -> str | None:
    """What is farther from `exact` than `FARTHER` times what `one` is."""
    missing = [n for n, g in exact.grads.items() if n not in result.grads and g.abs().max() > 0]
    if missing:
        return f"the gradient of {missing[0]} exists on only one side"
    loss, allowed = abs(result.loss - exact.loss).item(), FARTHER * abs(one.loss - exact.loss).item()
    if not loss <= allowed + torch.finfo(torch.bfloat16).eps * abs(exact.loss).item():
        return f"the loss is {result.loss.item():.9g}, on one device {exact.loss.item():.9g}"
    return too_far([_apart(exact, one, result)])


def _apart(exact: Reference, one: Reference, result: StepResult) -> tuple[float, float]:
    return distances(exact.grads, result.grads, one.grads)


def distances(exact: dict[str, Tensor], plan: dict[str, Tensor], one: dict[str, Tensor]) -> tuple[float, float]:
    """How far the gradients of a plan, and of one device in the same dtypes, are from the exact ones; relative to their norm."""
    def squares(grads: dict[str, Tensor]) -> float:
        return sum((grads[n].double() - g.double()).square().sum().item() for n, g in exact.items() if n in grads)

    size = squares(dict.fromkeys(exact, torch.zeros((), device=next(iter(exact.values())).device))) if exact else 0.0
    return (squares(plan) / (size or 1.0)) ** 0.5, (squares(one) / (size or 1.0)) ** 0.5


def too_far(draws: list[tuple[float, float]]) -> str | None:
    """Whether a plan is farther than it may be, by the mean squares of `distances`."""
    mine, one = (statistics.fmean(x * x for x in each) ** 0.5 for each in zip(*draws, strict=True))
    if not mine <= FARTHER * one + GRADIENT_TOLERANCE:
        return (f"the gradients are off by {mine:.2g} of their norm, one device's in these dtypes by {one:.2g} "
                f"(root mean square of {len(draws)} draws)")
    return None


def _frozen(program: Program) -> Program:
    """A copy that later passes, which edit in place, do not reach."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    frozen = copy.copy(program)
    frozen.module = fx.GraphModule(program.module, graph)
    frozen.sources = list(program.sources)
    return frozen


class _Inferred:
    """Observes passes, and keeps the program as it is before the passes that split it among ranks."""

    program: Program

    def __call__(self, name: str, program: Program) -> None:
        if name == "infer":
            self.program = _frozen(program)


def _run_model(model: nn.Module, call: Call) -> Reference:
    """One step of the plain model, whose buffers are updated."""
    args, kwargs = copy.deepcopy(call)
    inputs = {n: t for n, t in input_leaves((args, kwargs)).items() if isinstance(t, Tensor) and t.requires_grad}
    for t in inputs.values():
        t.grad = None
    with torch.enable_grad(), as_trained(model, kwargs) as (kwargs, *_), _own_gradients(model) as parameters:
        loss = scalar_of(model(*args, **kwargs))
        if loss.requires_grad:
            loss.backward()
    changed = {n: b.detach().clone() for n, b in model.named_buffers()}
    return Reference(loss.detach(), {n: p.grad.to_dense() for n, p in parameters.items() if p.grad is not None},
                     {n: t.grad for n, t in inputs.items() if t.grad is not None}, changed)


@contextlib.contextmanager
def _own_gradients(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, the model has parameters of the same values whose gradients and hooks are nobody's; yields them by name.

    `torch.autograd.grad` would need none, but a model that checkpoints reentrantly has `backward` alone.
    """
    made: dict[int, nn.Parameter] = {}
    undo: list[tuple[dict, str, nn.Parameter]] = []
    try:
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    undo.append((module._parameters, name, p))
                    module._parameters[name] = made.setdefault(id(p), nn.Parameter(p.detach(), p.requires_grad))
        yield dict(model.named_parameters())
    finally:
        for table, name, p in undo:
            table[name] = p


def _run_program(program: Program, model: nn.Module, inputs: dict[str, Any], seed: int,
                 record: dict[str, Any] | None = None) -> Reference:
    """One step of a program that is still global, on this device."""
    known: dict[str, dict[str, Any]] = {"param": dict(model.named_parameters()), "buffer": dict(model.named_buffers()),
                                        "input": inputs}
    feed = []
    for source in program.sources:
        value = known.get(source.kind, {}).get(
            source.name, torch.tensor(seed) if source.kind == "seed" else source.value)
        if isinstance(value, Tensor):
            value = value.detach().clone().to(source.value.dtype).requires_grad_(source.requires_grad)
        feed.append(value)
    outs = run_flat(program.module, feed, record)
    sinks = program.tensor_sinks()
    loss = scalar_of(unflatten(program, outs))
    wants = [(s, f) for s, f in zip(program.sources, feed, strict=True) if s.requires_grad]
    found = torch.autograd.grad(loss, [f for _, f in wants], allow_unused=True) if loss.requires_grad else [None] * len(wants)
    grads = {(s.kind, s.name): g for (s, _), g in zip(wants, found, strict=True) if g is not None}
    new = {s.name: o.detach() for s, o in zip(sinks, outs, strict=True) if s.kind == "buffer"}
    return Reference(loss.detach(), {n: g for (k, n), g in grads.items() if k == "param"},
                     {n: g for (k, n), g in grads.items() if k == "input"}, new)


def _first_difference(reference: Reference, result: Any, *, loss_tolerance: float, gradient_tolerance: float) -> str | None:
    off = _relative(result.loss, reference.loss)
    if not off <= loss_tolerance and not (result.loss - reference.loss).abs().item() <= reference.rounding():
        return f"the loss is {result.loss.item():.9g}, on one device {reference.loss.item():.9g} (off by {off:.2g})"
    largest = max((g.norm().item() for g in reference.grads.values()), default=0.0)
    for kind, mine, theirs in (("", result.grads, reference.grads), ("input ", result.input_grads, reference.input_grads)):
        missing = set(theirs) ^ set(mine)
        missing = {n for n in missing if (theirs.get(n, mine.get(n))).any()}
        if missing:
            return f"the gradient of {kind}{sorted(missing)[0]} exists on only one side"
        for name in set(theirs) & set(mine):
            error = (mine[name] - theirs[name]).norm().item()
            size = theirs[name].norm().item()
            if error <= gradient_tolerance * size + NOISE * largest:
                continue
            if kind or not error <= ROUNDING * size or not reference.is_zero(name):
                return f"the gradient of {kind}{name} is off by {error / max(size, 1e-30):.2g} of its norm"
    widest = max((b.double().norm().item() for n, b in reference.buffers.items() if n in result.buffers), default=0.0)
    for name, value in result.buffers.items():
        if name in reference.buffers and value.is_floating_point():
            error = (value.double() - reference.buffers[name].double()).norm().item()
            if not error <= 1e-5 * reference.buffers[name].double().norm().item() + NOISE * widest:
                return f"the new value of buffer {name} is off by {_relative(value, reference.buffers[name]):.2g}"
        if name in reference.buffers and not value.is_floating_point() and not torch.equal(value, reference.buffers[name]):
            return f"the new value of buffer {name} differs"
    return None


def _relative(mine: Tensor, theirs: Tensor) -> float:
    scale = theirs.double().norm().item()
    return (mine.double() - theirs.double()).norm().item() / (scale if scale > 0 else 1.0)


def _finite(have: Tensor, want: Tensor) -> list[Tensor]:
    """Both, with 0 where they are the same infinity, or no number: what a model computes and masks out."""
    same = ~want.isfinite() & ((have == want) | (have.isnan() & want.isnan()))
    return [t.masked_fill(same, 0) for t in (have, want)]


def _explain(problem: str, simulation: Simulation, inferred: Program, seed: int, compare: Callable[[Any], str | None]) -> str:
    """Add to `problem` the pass after which the program differs, and the first value that does.

    The model is captured once more: keeping what each pass made would take longer than the passes do, and is for this alone.
    """
    model, call, mesh = simulation.model, simulation.captured.call, simulation.program.mesh
    inputs = input_leaves(call)
    stages: list[tuple[str, Program]] = []
    Captured(model, call[1] or call[0], device=simulation.captured.device).partition(
        simulation.plan, observe=lambda name, program: stages.append((name, _frozen(program))))
    for name, program in stages:
        if name == "partition":
            break
        alone = _run_program(program, model, inputs, seed)
        if name != "capture" and any(s.kind == "seed" for s in simulation.program.sources) and not any(
                s.kind == "seed" for s in program.sources):
            continue
        if compare(alone):
            return f"{problem}; the program differs from the model after pass {name!r}"
    expected: dict[str, Any] = {}
    _run_program(inferred, model, inputs, seed, expected)
    for node in inferred.graph.nodes:
        if global_value(node).by_expert:  # each rank's rows are in an order of their own
            expected.pop(node.name, None)
    found: list[str] = []

    def watch(node: fx.Node, values: list[Any]) -> None:
        made = local_value(node).global_name
        if found or made not in expected or not isinstance(values[0], Tensor) or node.op == "placeholder":
            return
        want = expected[made]
        have = put([v.detach() for v in values], sharding_at(node), want.shape, mesh)
        floats = want.is_floating_point()
        if not (_relative(*_finite(have, want)) <= 1e-5 if floats else torch.equal(have, want)):
            found.append(f"first value that differs: {made} {local_value(node).layout_text} ({user_line(node)})")

    simulation.watch = watch
    simulation.step(*call[0], **call[1], seed=seed)
    simulation.watch = None
    where = found[0] if found else "every value of the forward agrees: a backward differs"
    return f"{problem}; after pass 'partition'; {where}; plan {simulation.plan}"


def _explain_lowered(problem: str, simulation: Simulation, seed: int, compare: Callable[[Any], str | None]) -> str:
    """Add to `problem` what made the difference: the program, one of the inductor backend's graph passes, or the compiler."""
    plan, (args, kwargs) = simulation.plan, simulation.captured.call

    def differs(**options: Any) -> bool:
        return compare(Simulation(simulation.captured, plan, **options).step(*args, **kwargs, seed=seed)) is not None

    if differs():
        return f"{problem}; the partitioned program differs already: try lowered=False; plan {plan}"
    names = [module.__name__.rpartition(".")[2] for module, _ in graph_passes(plan)]
    for count in range(len(names) + 1):
        if differs(lowered=True, transport=simulation.transport, passes=count):
            made_by = f"the graph pass {names[count - 1]!r}" if count else "the joint graph, or its cut into forward and backward"
            return f"{problem}; the partitioned program agrees: {made_by} makes the difference; plan {plan}"
    return f"{problem}; the lowered graphs agree: the compiler makes the difference; plan {plan}"
