"""`fxpar.inspect`: the numbers of its report, by hand, and Megatron's communication found in an unmodified Llama.

``python -m tests.report.test_inspection`` rewrites the golden report.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxpar
import fxpar.report.report
from fxpar.report.memory import Peak
from tests import zoo

GOLDEN = Path(__file__).parent.parent / "golden" / "llama_tp2.txt"
LAYERS = 3


def llama(layers: int = LAYERS, batch: int = 4, seq: int = 512) -> zoo.Built:
    """On the meta device, where size costs nothing."""
    with torch.device("meta"):
        return zoo.language_model("LlamaConfig", vocab=32000, seq=1, hidden_size=1024, intermediate_size=2816,
                                  num_hidden_layers=layers, num_attention_heads=16,
                                  num_key_value_heads=8)[0].train(), dict.fromkeys(
            ("input_ids", "labels"), torch.empty(batch, seq, dtype=torch.long))


def report(plan: str, **sizes: int) -> fxpar.Report:
    model, batch = llama(**sizes)
    return fxpar.inspect(model, plan, batch)


def counts(made: fxpar.Report, phase: str) -> Counter[tuple[str, str]]:
    """(kind, the last name of the module) -> how many."""
    out: Counter[tuple[str, str]] = Counter()
    for row in made.collectives:
        if row.phase == phase:
            out[row.kind, row.where.rpartition(".")[2]] += row.count
    return out


# ---- Megatron's communication ----


def golden() -> str:
    """The text without the predicted peak, which depends on PyTorch's partitioner."""
    lines = str(dataclasses.replace(report("tp=2"), predicted=lambda: None)).splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("peak memory")) + "\n"


def test_report_is_the_golden_text():
    assert golden() == GOLDEN.read_text(), "python -m tests.report.test_inspection rewrites it"


def test_sequence_parallel_communication_is_megatrons():
    made = report("tp=2")
    assert counts(made, "forward") == {
        ("all_gather", "q_proj"): LAYERS, ("all_gather", "gate_proj"): LAYERS, ("all_gather", "lm_head"): 1,
        ("reduce_scatter", "o_proj"): LAYERS, ("reduce_scatter", "down_proj"): LAYERS,
        ("reduce_scatter", "embed_tokens"): 1,
        ("all_reduce", ""): 3,  # the loss: maximum, sum of exponentials, label's logit
    }  # fmt: skip
    assert counts(made, "backward") == {
        ("reduce_scatter", "q_proj"): LAYERS, ("reduce_scatter", "gate_proj"): LAYERS,
        ("reduce_scatter", "lm_head"): 1,
        ("all_gather", "o_proj"): LAYERS, ("all_gather", "down_proj"): LAYERS, ("all_gather", "embed_tokens"): 1,
        ("all_reduce", "input_layernorm"): LAYERS, ("all_reduce", "post_attention_layernorm"): LAYERS,
        ("all_reduce", "norm"): 1,
    }  # fmt: skip


def test_communication_without_sequence_parallelism_is_megatrons():
    """And each norm's gradient, which all ranks compute alike, is averaged, so that it stays the same on all of them."""
    made = report("tp=2,sequence_parallel=false")
    assert counts(made, "forward") == {
        ("all_reduce", "o_proj"): LAYERS, ("all_reduce", "down_proj"): LAYERS, ("all_reduce", "embed_tokens"): 1,
        ("all_reduce", ""): 3,
    }  # fmt: skip
    assert counts(made, "backward") == {
        ("all_reduce", "q_proj"): LAYERS, ("all_reduce", "gate_proj"): LAYERS, ("all_reduce", "lm_head"): 1,
        ("all_reduce", "input_layernorm"): LAYERS, ("all_reduce", "post_attention_layernorm"): LAYERS, ("all_reduce", "norm"): 1,
    }  # fmt: skip


def test_data_parallel_communication_is_one_reduction_a_parameter():
    made = report("dp=4")
    assert made.count("all_reduce", "backward", ("dp",)) == len(made.parameters)
    assert made.count("all_reduce", "forward") == 2  # the loss and the number of labels
    assert sum(r.count for r in made.collectives) == len(made.parameters) + 2
    size = sum(p.local_bytes for p in made.parameters)
    assert sum(r.bytes for r in made.collectives if r.phase == "backward") == size


def test_one_rank_communicates_nothing():
    assert report("dp=1").collectives == []


def test_a_thousand_ranks_and_a_meta_model_need_no_processes():
    made = report("dp=128,tp=8", layers=1, batch=256)
    assert made.mesh.world_size == 1024
    row = next(p for p in made.parameters if p.name.endswith("down_proj.weight"))
    assert row.local_shape == (1024, 352) and row.local_bytes == 1024 * 352 * 4
    assert "world size 1024" in str(made)


def test_bytes_of_collectives_are_those_of_their_results():
    made = {(r.kind, r.where.rpartition(".")[2]): r.bytes for r in report("tp=2").collectives if r.phase == "forward"}
    stream = 4 * 512 * 1024 * 4  # batch x seq x hidden in fp32
    assert made["all_gather", "lm_head"] == stream
    assert made["reduce_scatter", "embed_tokens"] == stream // 2
    assert made["all_gather", "q_proj"] == LAYERS * stream


# ---- memory and compute ----


def test_the_peak_is_predicted_when_it_is_asked_for(monkeypatch):
    asked = []
    peak = Peak(2**30, "forward", "", {}, 0)
    monkeypatch.setattr(fxpar.report.report, "predict", lambda program: asked.append(program) or peak)
    made = fxpar.inspect(Mlp(), "dp=2", (torch.empty(8, 16),))
    assert made.memory and made.flops and made.count("all_reduce") and repr(made) and not asked
    assert "peak memory a rank: 1.000 GiB" in str(made) and made.peak_memory == 2**30
    assert len(asked) == 1


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))).square().sum()


@pytest.mark.parametrize("plan, parameters", [
    ("dp=1", 64 * 16 + 64 + 8 * 64 + 8),
    ("dp=2", 64 * 16 + 64 + 8 * 64 + 8),
    ("tp=2", 32 * 16 + 32 + 8 * 32 + 8),
    ("dp=2,tp=2", 32 * 16 + 32 + 8 * 32 + 8),
])  # fmt: skip
def test_memory_of_an_mlp(plan, parameters):
    assert fxpar.inspect(Mlp(), plan, (torch.empty(8, 16),)).memory == {
        "parameters": 4 * parameters, "gradients": 4 * parameters, "optimizer": 8 * parameters}


def test_frozen_parameters_take_neither_gradients_nor_optimizer_state():
    model = Mlp()
    model.up.requires_grad_(False)
    memory = fxpar.inspect(model, "dp=2", (torch.empty(8, 16),)).memory
    left = 8 * 64 + 8
    assert (memory["gradients"], memory["optimizer"]) == (4 * left, 8 * left)
    assert memory["parameters"] == 4 * (left + 64 * 16 + 64)


def test_memory_of_half_precision_parameters():
    memory = fxpar.inspect(Mlp().bfloat16(), "tp=2", (torch.empty(8, 16, dtype=torch.bfloat16),)).memory
    assert (memory["parameters"], memory["gradients"], memory["optimizer"]) == (2 * 808, 2 * 808, 4 * 808)


@pytest.mark.parametrize("plan, dp, ranks", [("dp=1", 1, 1), ("dp=2", 2, 2), ("tp=2", 1, 2), ("dp=2,tp=2", 2, 4)])
def test_flops(plan, dp, ranks):
    one = fxpar.inspect(nn.Linear(16, 8), plan, (torch.empty(32, 16),))  # alone, it has no dim for tp
    assert one.flops == 2 * 2 * 32 * 16 * 8 // dp  # the forward, and the gradient of the weight; the input has none
    two = fxpar.inspect(Mlp(), plan, (torch.empty(8, 16),))
    assert two.flops == 2 * 8 * (2 * 16 * 64 + 3 * 64 * 8) // ranks
    assert fxpar.inspect(Mlp().eval(), plan, (torch.empty(8, 16),)).flops == 2 * 8 * (16 * 64 + 64 * 8) // ranks


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_flops_of_convolutions_are_those_that_pytorch_counts():
    whole = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ConvTranspose2d(16, 4, 2))
    x = torch.randn(4, 3, 9, 9)
    for ranks in (1, 2):
        assert fxpar.inspect(whole, f"dp={ranks}", (x,)).flops == counted(lambda: whole(x).sum().backward()) // ranks
    depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 3, groups=4))
    x = torch.randn(4, 8, 9, 9)
    first, *others = (2 * 4 * n for n in (7 * 7 * 8 * 9, 7 * 7 * 8 * 4, 5 * 5 * 4 * 9))  # batch, positions, channels, taps
    assert counted(lambda: depthwise(x)) == first + sum(others)
    for ranks in (1, 2):
        assert fxpar.inspect(depthwise.eval(), f"dp={ranks}", (x,)).flops == (first + sum(others)) // ranks
        made = fxpar.inspect(depthwise.train(), f"dp={ranks}", (x,))
        assert made.flops == (2 * first + 3 * sum(others)) // ranks  # PyTorch counts the backward of groups as if dense


def test_parameter_rows_of_a_fused_weight():
    rows = {p.name: p for p in fxpar.inspect(zoo.NanoGPT(), "tp=2", (zoo.ids(), zoo.labels())).parameters}
    fused = rows["h.0.attn.c_attn.weight"]
    assert (fused.shape, fused.local_shape, fused.local_bytes) == ((96, 32), (48, 32), 4 * 48 * 32)
    assert "heads4/tp" in fused.layout


if __name__ == "__main__":
    GOLDEN.write_text(golden())
