"""Safetensors: what is exported Hugging Face loads, and what Hugging Face saves any plan loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fxpar
from fxpar.checkpoint.huggingface import INDEX, SINGLE
from fxpar.errors import CheckpointError
from tests.checkpoint.test_checkpoint import Small, build, full, on_meta
from tests.processes import launch
from tests.run.test_module import parallel, replica_of

SIZE = 20_000
"""Bytes in a file: the models of these tests take several."""


def through_ranks(rank: int, ours: str, theirs: str, name: str, plan: str) -> tuple[float, bool]:
    """Export a model to `ours`; fill a meta model from `theirs`: its loss, and whether a parameter was split inside a dim."""
    model, batch = build(name)
    fxpar.export_safetensors(ours, parallel(model.float(), plan, batch), max_file_bytes=SIZE)
    module = parallel(on_meta(name).float(), plan, batch)
    fxpar.load_checkpoint(theirs, module)
    strided = any("_StridedShard" in str(p.placements) for p in module.parameters() if isinstance(p, DTensor))
    return module.eval()(**replica_of(module, batch)).loss.item(), strided


def loss(model: nn.Module, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return model.eval()(**batch).loss.item()


def both_ways(name: str, plan: str, path: Path) -> None:
    ours, theirs = path / "ours", path / "theirs"
    model, batch = build(name)
    want = loss(model.float(), batch)
    model.save_pretrained(theirs, max_shard_size="20KB")
    for have, strided in launch(fxpar.Plan.parse(plan).world_size, through_ranks, str(ours), str(theirs), name, plan):
        assert have == pytest.approx(want, rel=1e-6) and (strided or name != "gpt2" or "tp" not in plan)
    again = transformers.AutoModelForCausalLM.from_pretrained(ours)
    assert loss(again, batch) == pytest.approx(want, rel=1e-6)
    assert again.config.architectures == [type(model).__name__]
    state = {n: t for f in ours.glob("*.safetensors") for n, t in load_file(f).items()}
    parameters = dict(model.named_parameters())
    assert state.keys() == parameters.keys() and all(torch.equal(t, parameters[n]) for n, t in state.items())
    assert json.loads((ours / INDEX).read_text())["weight_map"].keys() == state.keys()


@pytest.mark.multiproc
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "llama")])
def test_round_trips_with_hugging_face(name, tmp_path):
    both_ways(name, "tp=2", tmp_path)


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("plan", ["tp=4", "dp=4,zero=3", "dp=2,tp=2,zero=3"])
def test_round_trips_under_more_plans(name, plan, tmp_path):
    both_ways(name, plan, tmp_path)


def small(seed: int = 0, **options: Any) -> Small:
    torch.manual_seed(seed)
    return Small(**options)


def test_one_process_and_a_plain_module(tmp_path):
    """Scalars, integers, buffers; one file; the folder and the file can be given."""
    model = small()
    fxpar.export_safetensors(tmp_path, model)
    assert [p.name for p in tmp_path.iterdir()] == [SINGLE]
    for path, other in ((tmp_path, small(7)), (tmp_path / SINGLE, fxpar.parallelize(small(7), "dp=1", (torch.randn(8, 6),)))):
        fxpar.load_safetensors(path, other)
        for key, value in other.state_dict().items():
            assert torch.equal(full(value), model.state_dict()[key])


def test_files_of_an_earlier_export_do_not_stay(tmp_path):
    for size in (300, 5000, 100):
        fxpar.export_safetensors(tmp_path, small(), max_file_bytes=size)
        (tmp_path / "notes.txt").write_text("mine")
    names = sorted(p.name for p in tmp_path.iterdir())
    index = json.loads((tmp_path / INDEX).read_text())
    assert names == sorted({*index["weight_map"].values(), INDEX, "notes.txt"})
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in small().state_dict().values())
    fxpar.export_safetensors(tmp_path, small())
    assert sorted(p.name for p in tmp_path.iterdir()) == [SINGLE, "notes.txt"]


def test_either_name_of_a_tied_tensor_will_do(tmp_path):
    model, _ = build("llama")
    state = model.state_dict()
    other, _ = build("llama", seed=7)
    for kept in (["lm_head.weight"], ["model.embed_tokens.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):
        tied = {"lm_head.weight", "model.embed_tokens.weight"}
        save_file({n: t.clone() for n, t in state.items() if n not in tied or n in kept}, tmp_path / SINGLE)
        fxpar.load_safetensors(tmp_path, other)
        assert torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_dtypes_are_converted(tmp_path):
    fxpar.export_safetensors(tmp_path, small().bfloat16())
    model = small(7)
    fxpar.load_safetensors(tmp_path, model)
    assert torch.equal(model.up.weight, small().bfloat16().up.weight.float())


def test_what_does_not_fit_is_said_and_changes_nothing(tmp_path):
    fxpar.export_safetensors(tmp_path, small(), max_file_bytes=300)
    model = small(7)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"up.weight has shape \(8, 6\) there and \(16, 6\) in the model"):
        fxpar.load_safetensors(tmp_path, Small(16))
    other = small()
    other.more, other.unused = nn.Linear(2, 2), None
    with pytest.raises(CheckpointError, match=r"lacks tensors of the model: more.weight, more.bias; .* model lacks: unused"):
        fxpar.load_safetensors(tmp_path, other)
    with pytest.raises(CheckpointError, match="safetensors hold no optimizer state"):
        fxpar.load_checkpoint(tmp_path, model, torch.optim.SGD(model.parameters()))
    file = max(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        fxpar.load_safetensors(tmp_path, model)
    file.unlink()
    with pytest.raises(CheckpointError, match="this file is missing"):
        fxpar.load_safetensors(tmp_path, model)
    with pytest.raises(CheckpointError, match="there are no safetensors"):
        fxpar.load_safetensors(tmp_path / "elsewhere", model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
