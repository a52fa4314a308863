"""A step in microbatches has the loss and gradients of the whole batch, whatever the loss divides by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import fxpar
from fxpar.errors import PlanError
from fxpar.ops.collectives import typed
from fxpar.ops.runtime import axis_index
from fxpar.program import Program
from fxpar.sharding.mesh import MICROBATCH
from fxpar.testing import assert_equivalent

Case = tuple[nn.Module, dict[str, Tensor]]
ROWS, SEQ, VOCAB = 8, 12, 48
PLANS = ("dp=1", "dp=2", "dp=2,tp=2", "dp=2,zero=1", "dp=2,zero=3", "dp=4,dp_replicate=2,zero=2")


def tokens() -> tuple[Tensor, Tensor]:
    """Token ids, and labels of which every row ignores another number."""
    ids = torch.randint(1, VOCAB, (ROWS, SEQ), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row in range(ROWS):
        labels[row, : (row * 5) % (SEQ - 2)] = -100
    return ids, labels


def llama() -> Case:
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
                         num_key_value_heads=2, use_cache=False)
    ids, labels = tokens()
    return LlamaForCausalLM(config).train(), {"input_ids": ids, "labels": labels}


def gpt2() -> Case:
    """Its head is the table of its embedding; dropout is on."""
    config = GPT2Config(vocab_size=VOCAB, n_positions=SEQ, n_embd=16, n_layer=1, n_head=4, use_cache=False)
    ids, labels = tokens()
    return GPT2LMHeadModel(config).train(), {"input_ids": ids, "labels": labels}


def t5() -> Case:
    config = T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=4,
                      dropout_rate=0.0, use_cache=False, decoder_start_token_id=0)
    ids, labels = tokens()
    mask = torch.ones_like(ids)
    mask[2, 5:] = 0
    return T5ForConditionalGeneration(config).train(), {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Net(nn.Module):
    """Rows of eight numbers, five classes; `objective(module, logits, y)` is its loss."""

    def __init__(self, objective: Callable[[Any, Tensor, Tensor], Any], drop: float = 0.0):
        super().__init__()
        self.up, self.down, self.shift = nn.Linear(8, 16), nn.Linear(16, 5), nn.Parameter(torch.randn(5))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("average", torch.zeros(5))
        self.objective, self.drop = objective, drop

    def forward(self, x: Tensor, y: Tensor) -> Any:
        h = F.dropout(F.gelu(self.up(x)), self.drop, self.training)
        return self.objective(self, self.down(h), y)


def batch() -> dict[str, Tensor]:
    y = torch.arange(ROWS) % 5
    y[:3] = -100
    return {"x": torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1)), "y": y}


def counted(net: Net, logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y)


def smoothed(net: Net, logits: Tensor, y: Tensor) -> Tensor:
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    return F.cross_entropy(logits, y, weight, label_smoothing=0.2)


def penalised(net: Net, logits: Tensor, y: Tensor) -> Tensor:
    """A z-loss over what is counted, a term divided by a Python number of rows, a penalty, a constant."""
    keep = (y != -100).float()
    z = torch.logsumexp(logits, -1)
    zloss = (z * z * keep).sum() / keep.sum().clamp(min=1)
    loss = F.cross_entropy(logits, y) + 0.1 * zloss + z.sum() / logits.shape[0]
    return loss + 0.1 * net.down.weight.square().sum() - 0.5


def chosen(net: Net, logits: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Guarded, stacked and reshaped; rows weighted by their position; outputs of every kind beside the loss."""
    place = 1 + torch.arange(ROWS) / ROWS
    keep = y != -100
    rows = F.cross_entropy(logits + net.shift.expand(ROWS, 5), y, reduction="none", ignore_index=-100)
    loss = (rows * place * keep).sum() / (place * keep).sum()
    loss = torch.where(keep.any(), loss, torch.zeros_like(loss))
    loss = torch.stack([loss, 1 - loss, 2 * net.shift.square().sum()]) @ torch.tensor([3.0, 1.0, 0.5])
    return {"loss": loss, "perplexity": loss.detach().exp(), "right": (logits.argmax(-1) == y).sum(), "rows": rows}


def buffered(net: Net, logits: Tensor, y: Tensor) -> Tensor:
    """Buffers that a whole batch updates once: one with what depends on no row, one with what depends on no parameter."""
    net.calls += 1
    net.average.mul_(0.9).add_(F.one_hot(y.clamp(min=0), 5).sum(0))
    return F.cross_entropy(logits, y) + net.calls * 0.1


def net(objective: Callable[[Any, Tensor, Tensor], Any], drop: float = 0.0) -> Case:
    return Net(objective, drop), batch()


SMALL: dict[str, Callable[[], Case]] = {
    "ignored labels": lambda: net(counted), "smoothing": lambda: net(smoothed), "penalties": lambda: net(penalised),
    "dropout": lambda: net(penalised, drop=0.3), "outputs": lambda: net(chosen), "buffers": lambda: net(buffered),
}  # fmt: skip
MODELS: dict[str, Callable[[], Case]] = {**SMALL, "llama": llama, "gpt2": gpt2, "t5": t5}


def check(name: str, plan: str, count: int, **options: Any) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    plan = f"{plan},microbatches={count}"
    step = fxpar.simulate(model, plan, inputs).program.microbatches
    assert step is not None and step.exact[0]
    assert_equivalent(model, plan, inputs, **options)


@settings(max_examples=7)
@given(st.sampled_from(sorted(SMALL)), st.sampled_from(PLANS), st.sampled_from([2, 4]))
def test_some_models_in_microbatches_are_the_whole_batch(name, plan, count):
    check(name, plan, 2 if plan.startswith("dp=4") else count)


def test_a_language_model_in_microbatches_is_the_whole_batch():
    check("gpt2", "dp=2,tp=2", 2)


@pytest.mark.slow
@settings(max_examples=60)
@given(st.sampled_from(sorted(MODELS)), st.sampled_from(PLANS), st.sampled_from([2, 4]))
def test_models_in_microbatches_are_the_whole_batch(name, plan, count):
    check(name, plan, 2 if plan.startswith("dp=4") else count)


def test_lowered_graphs_of_microbatches_are_the_whole_batch():
    check("smoothing", "dp=2,zero=1", 2, lowered=True)


@pytest.mark.slow
@settings(max_examples=12)
@given(st.sampled_from(sorted(MODELS)), st.sampled_from(PLANS))
def test_lowered_graphs_of_models_in_microbatches_are_the_whole_batch(name, plan):
    check(name, plan, 2, lowered=True)


def test_the_mean_of_microbatches_is_something_else():
    """What `test_*_are_the_whole_batch` would not find out on a batch whose parts count alike."""
    torch.manual_seed(0)
    model, inputs = net(counted)
    whole = model(**inputs)
    parts = [model(**{k: v.chunk(2)[i] for k, v in inputs.items()}) for i in range(2)]
    assert abs(sum(parts) / 2 - whole) > 1e-3 * whole


# ---- the program ----


def partitioned(model: nn.Module, inputs: Any, plan: str = "dp=2,microbatches=2") -> Program:
    return fxpar.compile_program(model, plan, inputs)


def test_nothing_is_communicated_over_microbatches_and_the_mesh_is_that_of_ranks():
    program = partitioned(*net(chosen, drop=0.1), "dp=2,zero=3,microbatches=2")
    assert program.mesh == fxpar.compile_program(*net(chosen)[:1], "dp=2,zero=3", batch()).mesh
    assert program.microbatches is not None and program.microbatches.index is not None
    for node in program.graph.nodes:
        made = typed(node) if node.op == "call_function" else None
        assert made is None or MICROBATCH not in made.axes
        assert node.target is not axis_index or MICROBATCH not in node.args[0]


def test_what_depends_on_no_parameter_is_passed_in():
    """Of the cross entropy, the number of labels that count; and nothing where nothing divides by one."""
    step = partitioned(*net(counted)).microbatches
    assert step is not None and len(step.passed) == 1 and step.prologue is not None and step.index is None

    def total(module: Net, logits: Tensor, y: Tensor) -> Tensor:
        return logits.square().sum() / logits.shape[0]

    alone = partitioned(*net(total)).microbatches
    assert alone is not None and alone.prologue is None and not alone.passed and alone.joins == ["sum"]


def test_outputs_are_joined_by_what_they_are():
    model, inputs = net(chosen)
    program = partitioned(model, inputs)
    assert program.microbatches is not None
    assert program.microbatches.joins == ["sum", "mean", "sum", "rows"]
    whole, parts = (fxpar.simulate(model, plan, inputs).step(**inputs).outputs for plan in ("dp=1", "dp=2,microbatches=2"))
    for name in ("loss", "right", "rows"):
        torch.testing.assert_close(parts[name], whole[name])


# ---- what is not linear ----


class Experts(nn.Module):
    """A mixture whose load-balancing loss is a product of two means over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.head = nn.Linear(8, 4), nn.Linear(8, 5)

    def forward(self, x: Tensor, y: Tensor, apart: bool = False) -> Any:
        shares = torch.softmax(self.route(x), -1)
        hot = (shares >= shares.amax(-1, keepdim=True)).float()
        balance = 4 * (hot.mean(0) * shares.mean(0)).sum()
        loss = F.cross_entropy(self.head(x) * (hot * shares).sum(-1, keepdim=True), y)
        return (loss, balance) if apart else loss + 0.5 * balance


@pytest.mark.parametrize("plan", ["dp=1", "dp=2,tp=2"])
def test_a_load_balancing_loss_is_the_mean_over_microbatches_and_noted(plan):
    """Beside a loss over counted labels, which stays that of the whole batch."""
    torch.manual_seed(0)
    model, inputs = Experts(), batch()
    simulation = fxpar.simulate(model, f"{plan},microbatches=2", inputs)
    (note,) = [n for n in simulation.program.notes if "microbatches" in n]
    assert note.startswith("not linear in microbatches") and "balance = 4 * (hot.mean(0) * shares.mean(0)).sum()" in note
    result = simulation.step(**inputs)
    dp = fxpar.Plan.parse(plan).dp
    rows = [torch.cat([r.chunk(2)[i] for r in torch.arange(ROWS).chunk(dp)]) for i in range(2)]
    balances = [model(*(v[r] for v in inputs.values()), apart=True)[1] for r in rows]
    loss = model(**inputs, apart=True)[0] + 0.5 * sum(balances) / 2
    loss.backward()
    torch.testing.assert_close(result.loss, loss.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(result.grads[name], p.grad)
    assert_equivalent(model, f"{plan},microbatches=2", inputs)


class Normed(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.up, self.norm, self.head, self.drop = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 5), drop

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.norm(self.up(x))
        return F.cross_entropy(self.head(F.dropout(h, self.drop, self.training)), y)


def test_batch_norm_normalises_each_microbatch_and_averages_them_in_order():
    torch.manual_seed(0)
    model, inputs = Normed(), batch()
    inputs["y"] = inputs["y"].clamp(min=0)
    simulation = fxpar.simulate(model, "dp=2,microbatches=2", inputs)
    linear, buffers = [n for n in simulation.program.notes if "microbatches" in n]
    assert "h = self.norm(self.up(x))" in linear
    assert buffers.startswith("buffers norm.running_mean, norm.running_var are updated by each of the 2 microbatches, in order")
    result = simulation.step(**inputs)
    rows = [torch.cat([r.chunk(2)[i] for r in torch.arange(ROWS).chunk(2)]) for i in range(2)]
    loss = sum(model(*(v[r] for v in inputs.values())) for r in rows) / 2
    loss.backward()
    torch.testing.assert_close(result.loss, loss.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(result.grads[name], p.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(result.buffers["norm.running_mean"], model.norm.running_mean)
    torch.testing.assert_close(result.buffers["norm.running_var"], model.norm.running_var)


def test_a_variance_of_inputs_is_that_of_the_whole_batch():
    """It depends on no parameter: it is computed before the step."""
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(8, affine=False), nn.Linear(8, 5)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.head(self.norm(x)), y)

    model, inputs = First(), batch()
    result = fxpar.simulate(model, "dp=2,microbatches=2", inputs).step(**inputs)
    torch.testing.assert_close(result.loss, model(**inputs).detach())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(result.buffers[name], buffer)


def test_plans_agree_on_what_is_not_linear():
    """With dropout, whose mask is that of each row wherever it is."""
    torch.manual_seed(0)
    assert_equivalent(Normed(0.3), ["dp=2,tp=2,microbatches=2", "dp=2,zero=3,microbatches=2"], batch())


# ---- what cannot be ----


class Contrastive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        z = F.normalize(self.up(x), dim=-1)
        return F.cross_entropy(z @ z.t(), torch.arange(len(x)))


class Queue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 4)
        self.register_buffer("queue", torch.zeros(ROWS, 4))

    def forward(self, x: Tensor) -> Tensor:
        z = self.up(x)
        self.queue.copy_(z.detach())
        return z.square().mean()


@pytest.mark.parametrize("model, line, why", [
    (Contrastive(), "F.cross_entropy(z @ z.t()", "takes rows of all microbatches together, and depends on parameters"),
    (Queue(), "self.up(x)|self.queue.copy_", "the new value of buffer 'queue' holds rows of the whole batch"),
])
def test_what_needs_several_microbatches_at_once_is_refused_with_its_line(model, line, why):
    with pytest.raises(PlanError, match=rf"plan field `microbatches`=2: operator .*test_microbatches.py:\d+ .*{why}.*try "
                                        "microbatches=1.*no_sync") as error:
        fxpar.inspect(model, "dp=2,microbatches=2", {"x": torch.randn(ROWS, 8)})
    assert error.value.field == "microbatches" and any(part in str(error.value) for part in line.split("|"))
    fxpar.inspect(model, "dp=2", {"x": torch.randn(ROWS, 8)})


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(PlanError, match=r"`microbatches`=3: must divide each replica's part of a batch of 8 \(input 'x'\); try a "
                                        "batch of 12, or microbatches=1"):
        inspected(net(counted), "dp=2,microbatches=3")


def inspected(case: Case, plan: str) -> fxpar.Report:
    model, inputs = case
    return fxpar.inspect(model, plan, inputs)


# ---- the report ----


@pytest.mark.parametrize("plan, gathered, reduced", [
    ("dp=2", 0, 1), ("dp=2,zero=1", 1, 1), ("dp=2,zero=2", 1, 4), ("dp=2,zero=3", 4, 4)])
def test_a_report_counts_what_a_step_communicates(plan, gathered, reduced):
    """Parameters are gathered, and their gradients summed, as often as the plan says."""
    one, four = (inspected(llama(), f"{plan},microbatches={n}") for n in (1, 4))
    kind = "all_reduce" if plan == "dp=2" else "reduce_scatter"
    assert four.count(kind, "backward", ("dp",)) == reduced * one.count(kind, "backward", ("dp",)) > 0
    assert four.count("all_gather", "forward", ("dp",)) == gathered * one.count("all_gather", "forward", ("dp",))
    angles = 2 * (16 // 4 // 2) * SEQ  # of rotary positions, a product without gradients: each microbatch computes them
    assert four.flops == one.flops + 3 * angles
