"""Models in steps, on all ranks in this process: their gradients are the plain model's, and collectives are where they belong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxpar
from fxpar.backends import eager, stepped
from fxpar.backends.inductor import lower as inductor
from fxpar.backends.inductor.lowered import Lowered
from fxpar.backends.split import Half, Halves, split_backward
from fxpar.backends.stepped import Stepped
from fxpar.ops.vocabulary import WAIT
from fxpar.sharding.facts import local_value
from fxpar.testing import assert_equivalent
from fxpar.verify import simulation
from tests import zoo
from tests.graphs import local_feed, runtime_of
from tests.zoo.registry import BATCH, SEQ, labels, padding

SLOW = pytest.mark.slow


class InSteps(Lowered):
    """As `Lowered`, by steps. early: which gradients come first; None: those of activations; a number: of a random choice.
    eager: by that backend."""

    early: int | None = None
    eager = False

    def forward(self, module: fx.GraphModule, feeds: list[list[Any]]) -> list[list[Any]]:
        steps = self._made.setdefault(id(module), (module, self.stepped(module, feeds, self._chosen(module, feeds[0]))))[1]
        made = self.threads.run(lambda rank: steps[rank].forward(*feeds[rank]))
        outputs = [[x.requires_grad_() if i in step.roots else x for i, x in enumerate(outs)]
                   for step, (outs, _) in zip(steps, made, strict=True)]
        self.last = steps, outputs, feeds, [saved for _, saved in made]
        return outputs

    def stepped(self, module: fx.GraphModule, feeds: list[list[Any]], early: Collection[int] = ()) -> list[Stepped]:
        if not self.eager:
            return super().stepped(module, feeds, early)
        return [eager.stepped(module, feed, self.threads.runtime(rank), self.plan, early) for rank, feed in enumerate(feeds)]

    def _chosen(self, module: fx.GraphModule, feed: list[Any]) -> list[int]:
        wanted = [i for i, x in enumerate(feed) if isinstance(x, Tensor) and x.requires_grad]
        if self.early is not None:
            return sorted(Random(self.early).sample(wanted, len(wanted) // 2))
        places = module.graph.find_nodes(op="placeholder")
        return [i for i in wanted if local_value(places[i]).batch_dim is not None]

    def backward(self, roots: list[list[Tensor]], seeds: list[list[Tensor]],
                 inputs: list[list[Tensor]]) -> list[list[Tensor | None]]:
        steps, outputs, feeds, saved = self.last

        def on(rank: int) -> list[Tensor | None]:
            given = {id(x): grad for x, grad in zip(roots[rank], seeds[rank], strict=True)}
            grads = [given.get(id(x)) for x in outputs[rank]]
            if self.early is None or self.early % 2:
                early, left = steps[rank].input_gradients(saved[rank], grads)
                late = steps[rank].weight_gradients(left)
                found = dict(zip(steps[rank].early, early, strict=True)) | dict(zip(steps[rank].late, late, strict=True))
            else:
                found = dict(enumerate(steps[rank].backward(saved[rank], grads)))
            at = {id(x): found[i] for i, x in enumerate(feeds[rank])}
            return [at[id(x)] for x in inputs[rank]]

        return self.threads.run(on)


def activations(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model from its embeddings on, as a later stage of a pipeline gets them."""
    model, _ = zoo.build(name)
    inputs = {"inputs_embeds": torch.randn(BATCH, SEQ, 32).requires_grad_(), "labels": labels()}
    if name == "t5":
        inputs |= {"decoder_inputs_embeds": torch.randn(BATCH, SEQ, 32).requires_grad_(), "attention_mask": padding()}
    return model, inputs


class Made:
    """The halves of a backward, and their collectives before graph passes: (operator, axis) -> how many."""

    def __init__(self, halves: Halves):
        self.halves = halves
        self.first, self.second = (collectives(half) for half in (halves.first, halves.second))


def collectives(half: Half | None) -> Counter[tuple[str, str]]:
    nodes = half.module.graph.nodes if half is not None else []
    return Counter((n.target.overloadpacket.__name__, n.args[-1].split("-")[2]) for n in nodes
                   if getattr(n.target, "namespace", "") == "_c10d_functional" and n.target is not WAIT)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Made]:
    """Simulations run in steps; the backwards that were split."""
    found: list[Made] = []

    def seen(*args: Any) -> Halves:
        found.append(Made(split_backward(*args)))
        return found[-1].halves

    monkeypatch.setattr(simulation, "Lowered", InSteps)
    monkeypatch.setattr(stepped, "split_backward", seen)
    return found


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def test_collectives_are_in_the_half_that_needs_them_and_graph_passes_see_both(made):
    assert_equivalent(nn.Sequential(Block()), "dp=2,tp=2,zero=3", {"input": torch.randn(4, 2, 8).requires_grad_()}, lowered=True,
                      gradient_tolerance=1e-5)
    for one in made:
        # Parameters are gathered again for the gradient of the input, which the ranks of tp sum.
        assert one.first == {("all_gather_into_tensor", "dp"): 3, ("all_reduce", "tp"): 1}
        # Gradients of parameters are summed over dp, and those of what every rank of tp computes with over tp.
        assert one.second == {("reduce_scatter_tensor", "dp"): 5, ("all_reduce", "dp"): 1, ("all_reduce", "tp"): 3}
        assert sum(collectives(one.halves.second).values()) == 3  # in buckets
    assert made


@pytest.mark.parametrize("plan", ["dp=2,zero=3", pytest.param("dp=2,tp=2,zero=1", marks=SLOW)])
def test_ranks_run_eagerly(made, monkeypatch, plan):
    monkeypatch.setattr(InSteps, "eager", True)
    assert_equivalent(nn.Sequential(Block()), plan, {"input": torch.randn(4, 2, 8).requires_grad_()}, lowered=True,
                      gradient_tolerance=1e-5)
    assert made and all(one.first and one.second and one.halves.carried for one in made)


@SLOW
def test_a_process_compiles_its_steps(one_rank):
    batch = {"input": torch.randn(4, 2, 8).requires_grad_()}
    model = nn.Sequential(Block(), Block())
    program = fxpar.compile_program(model, "dp=1", batch)
    runtime, feed = runtime_of(program), local_feed(program, model, batch)
    early = [i for i, s in enumerate(program.sources) if s.kind == "input"]
    steps = inductor.stepped(program.module, feed, runtime, program.plan, early)
    (y,), saved = steps.forward(*feed)
    (grad,), left = steps.input_gradients(saved, [y])
    found = dict(zip(steps.late, steps.weight_gradients(left), strict=True)) | dict(zip(early, [grad], strict=True))
    (want,) = program.module(*feed)
    torch.testing.assert_close(y, want.detach())
    torch.testing.assert_close([found[i] for i in range(len(feed))], list(torch.autograd.grad(want, feed, want.detach())))


@SLOW
@pytest.mark.parametrize("plan", ["dp=2,tp=2,zero=3", "dp=2,zero=1"])
def test_a_stage_is_compiled(made, plan):
    assert_equivalent(nn.Sequential(Block(), Block()), plan, {"input": torch.randn(4, 2, 8).requires_grad_()},
                      backend="inductor", gradient_tolerance=1e-5)
    assert all(one.halves.carried for one in made)


@SLOW
@pytest.mark.parametrize("name, plan", [
    ("llama", "dp=2,tp=2,zero=3"),
    ("llama", "dp=2,zero=1,recompute=selective"),
    ("gpt2", "dp=2,tp=2,zero=3"),
    ("gpt2", "dp=2,recompute=full,microbatches=2"),
    ("t5", "dp=2,tp=2,zero=3"),
    ("t5", "tp=2"),
    ("llama", "dp=2,tp=2,zero=3,param_dtype=bf16"),
])  # fmt: skip
def test_stages_without_their_embeddings(made, name, plan):
    model, inputs = activations(name)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 5 != 3)  # some are frozen
    assert_equivalent(model, plan, inputs, lowered=True, loss_tolerance=1e-5, gradient_tolerance=1e-5)
    assert any(one.halves.carried for one in made)


@SLOW
@pytest.mark.parametrize("early", range(2))
@pytest.mark.parametrize("name, plan", [
    ("llama_tied", "dp=2,tp=2,zero=3"), ("bert", "dp=2,recompute=selective"), ("mixtral", "tp=2"), ("resnet", "dp=2,zero=3"),
    ("convolutions", "dp=2"), ("dropouts", "dp=2,recompute=full"), ("dlrm", "dp=2,tp=2"), ("lora", "tp=2"),
    ("outputs", "dp=2"), ("buffers", "dp=2"), ("nanogpt", "dp=2,tp=2,zero=1,microbatches=2"),
])  # fmt: skip
def test_any_parameters_may_come_first(made, monkeypatch, name, plan, early):
    monkeypatch.setattr(InSteps, "early", early)
    model, inputs = zoo.build(name)
    assert_equivalent(model, plan, inputs, lowered=True, gradient_tolerance=1e-5)
    assert made
