"""Checkpoints that are damaged or hostile."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpar
from fxpar.checkpoint.huggingface import SINGLE, SUMS
from fxpar.checkpoint.manifest import MANIFEST, METADATA
from fxpar.errors import CheckpointError
from tests.checkpoint.test_checkpoint_folder import save_value, value

# ---- mutations ----


class Model(nn.Module):
    """Several parameters of equal size, so that one can be taken for another; a buffer of integers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.register_buffer("count", torch.tensor([300 + seed, 2]))


def optimizer_of(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    made = torch.optim.AdamW(model.parameters(), lr=lr)
    sum(p.square().sum() for p in model.parameters()).backward()
    made.step()
    return made


def state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Everything that a load writes to, copied."""
    kept: dict[str, Any] = {k: v.clone() for k, v in model.state_dict().items()}
    if optimizer is not None:
        kept["lr"] = torch.tensor(optimizer.param_groups[0]["lr"])
        for name, p in model.named_parameters():
            kept |= {f"{name}.{k}": v.clone() for k, v in optimizer.state[p].items()}
    return kept


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 9))):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def drop(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randrange(1, 64)]


def repeat(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = data[at : at + rng.randrange(1, 64)]


def zero(data: bytearray, rng: random.Random) -> None:
    at, n = rng.randrange(len(data)), rng.randrange(1, 512)
    data[at : at + n] = bytes(len(data[at : at + n]))


def swap(data: bytearray, rng: random.Random) -> None:
    """Two stretches of the file change places."""
    n = rng.choice((16, 64, 256))
    a, b = rng.randrange(max(len(data) - n, 1)), rng.randrange(max(len(data) - n, 1))
    data[a : a + n], data[b : b + n] = bytes(data[b : b + n]), bytes(data[a : a + n])


def digit(data: bytearray, rng: random.Random) -> None:
    """A number, of text or of bytes, becomes another."""
    at = rng.choice([i for i, byte in enumerate(data) if chr(byte).isdigit()] or [0])
    data[at] = ord(str(rng.randrange(10)))


def within_a_file(path: Path, rng: random.Random) -> str:
    file = path / rng.choice(sorted(os.listdir(path)))
    change = rng.choice((flip, cut, drop, repeat, zero, swap, digit))
    data = bytearray(file.read_bytes())
    change(data, rng)
    file.write_bytes(data)
    return f"{change.__name__} {file.name}"


def remove(path: Path, rng: random.Random) -> str:
    name = rng.choice(sorted(os.listdir(path)))
    (path / name).unlink()
    return f"remove {name}"


def take_another(path: Path, rng: random.Random) -> str:
    """A file of a second checkpoint, of the same model with other values, in the place of its own."""
    name = rng.choice(sorted(os.listdir(path)))
    shutil.copy(path.with_name("other") / name, path / name)
    return f"another's {name}"


def edit_metadata(path: Path, rng: random.Random) -> str:
    """What the metadata says is changed, and is a good pickle still."""
    if not (path / METADATA).exists():
        return within_a_file(path, rng)
    metadata = pickle.loads((path / METADATA).read_bytes())
    places = list(metadata.storage_data)
    a, b = rng.sample(places, 2)
    what = rng.choice(("swap", "offset", "length", "file", "gone", "dtype", "parts"))
    if what == "swap":
        metadata.storage_data[a], metadata.storage_data[b] = metadata.storage_data[b], metadata.storage_data[a]
    elif what in ("offset", "length"):
        setattr(metadata.storage_data[a], what, rng.choice((-1, 0, 7, 10**30, None)))
    elif what == "file":
        metadata.storage_data[a].relative_path = rng.choice(("../other/__0_0.distcp", "/etc/passwd", ".", "", "a\0b", METADATA))
    elif what == "gone":
        del metadata.storage_data[a]
    else:
        entry = metadata.state_dict_metadata[rng.choice([k for k in metadata.state_dict_metadata if k.startswith("model")])]
        if what == "dtype":
            entry.properties.dtype = torch.float64
        else:
            entry.chunks.pop()
    (path / METADATA).write_bytes(pickle.dumps(metadata))
    return f"metadata {what}"


MUTATIONS: tuple[Callable[[Path, random.Random], str], ...] = (
    within_a_file, within_a_file, within_a_file, remove, take_another, edit_metadata)


def check_mutations(where: Path, seeds: range, optimizers: bool) -> int:
    """Every mutated checkpoint loads what was saved, or is refused with nothing changed; how many were refused."""
    for name, seed in (("other", 5), ("good", 0)):
        model = Model(seed)
        made = optimizer_of(model, lr=0.1 + seed) if optimizers else None
        fxpar.save_checkpoint(where / name, model, made)
    want, refused = state(model, made), 0
    for seed in seeds:
        rng = random.Random(seed)
        path = where / "c"
        shutil.copytree(where / "good", path)
        done = rng.choice(MUTATIONS)(path, rng)
        other = Model(9)
        theirs = optimizer_of(other) if optimizers else None
        before = state(other, theirs)
        try:
            fxpar.load_checkpoint(path, other, theirs)
        except CheckpointError as error:
            refused += 1
            assert equal(state(other, theirs), before), f"seed {seed}, {done}: refused, and the model was changed"
            assert str(where) in str(error) and error.way_out, f"seed {seed}, {done}: {error}"
        else:
            assert equal(state(other, theirs), want), f"seed {seed}, {done}: other values were loaded"
        shutil.rmtree(path)
    return refused


def test_a_mutated_checkpoint_is_right_or_refused(tmp_path):
    assert check_mutations(tmp_path, range(60), optimizers=True) > 40


@pytest.mark.slow
@pytest.mark.parametrize("optimizers", [False, True])
def test_more_mutated_checkpoints_are_right_or_refused(optimizers, tmp_path):
    assert check_mutations(tmp_path, range(1000, 1400), optimizers) > 250


def test_mutated_safetensors_are_right_or_refused(tmp_path):
    model = Model(0)
    fxpar.export_safetensors(tmp_path / "good", model)
    whole, refused = (tmp_path / "good" / SINGLE).read_bytes(), 0
    for seed in range(150):
        rng, data = random.Random(seed), bytearray(whole)
        change = rng.choice((flip, cut, drop, repeat, zero, swap, digit))
        change(data, rng)
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / SINGLE).write_bytes(data)
        other = Model(9)
        before = state(other, None)
        try:
            fxpar.load_safetensors(tmp_path / "s", other)
        except CheckpointError:
            refused += 1
            assert equal(state(other, None), before), f"seed {seed}, {change.__name__}: refused, and the model was changed"
        else:
            assert equal(state(other, None), state(model, None)), f"seed {seed}, {change.__name__}: other values were loaded"
    assert refused > 100


# ---- hostile folders ----


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def as_before_checksums(path: Path) -> None:
    """As a version of fxpar wrote it that made no list of its files."""
    (path / MANIFEST).unlink()


def in_the_metadata(path: Path, mark: Path) -> None:
    (path / METADATA).write_bytes(pickle.dumps(Payload(mark)))


def in_a_field_of_the_metadata(path: Path, mark: Path) -> None:
    metadata = pickle.loads((path / METADATA).read_bytes())
    metadata.planner_data = Payload(mark)
    (path / METADATA).write_bytes(pickle.dumps(metadata))


def replaced(path: Path, name: str, data: bytes) -> None:
    metadata = pickle.loads((path / METADATA).read_bytes())
    stored = next(v for k, v in metadata.storage_data.items() if k.fqn == name)
    with open(path / stored.relative_path, "r+b") as file:
        file.seek(0, os.SEEK_END)
        stored.offset, stored.length = file.tell(), len(data)
        file.write(data)
    (path / METADATA).write_bytes(pickle.dumps(metadata))


def in_the_summary(path: Path, mark: Path) -> None:
    torch.save({"format": 1, "dropout": Payload(mark), "optimizer": None}, path / "x")
    replaced(path, "fxpar", (path / "x").read_bytes())


def in_the_old_format(path: Path, mark: Path) -> None:
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, Payload(mark), [])
    replaced(path, "fxpar", b"".join(pickle.dumps(part, 2) for part in parts))


def in_a_tensor(path: Path, mark: Path) -> None:
    torch.save(Payload(mark), path / "x")
    replaced(path, "model.weight", (path / "x").read_bytes())


@pytest.mark.parametrize("hide", [in_the_metadata, in_a_field_of_the_metadata, in_the_summary, in_the_old_format, in_a_tensor])
def test_no_code_runs(hide, tmp_path):
    save_value(tmp_path / "c", 1.0)
    as_before_checksums(tmp_path / "c")
    hide(tmp_path / "c", tmp_path / "ran")
    with pytest.raises(CheckpointError):
        value(tmp_path / "c")
    assert not (tmp_path / "ran").exists()


def test_an_optimizer_that_would_not_load_is_not_saved(tmp_path):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["extra"] = Path(".")
    with pytest.raises(CheckpointError, match=r"hold a pathlib.PosixPath, which is no number"):
        fxpar.save_checkpoint(tmp_path / "c", model, optimizer)


@pytest.mark.parametrize("name", ["../other/__0_0.distcp", "{outside}", "..", "a\0b", ""])
def test_no_path_leads_out(name, tmp_path):
    for made, number in (("other", 2.0), ("c", 1.0)):
        save_value(tmp_path / made, number)
    as_before_checksums(tmp_path / "c")
    metadata = pickle.loads((tmp_path / "c" / METADATA).read_bytes())
    for stored in metadata.storage_data.values():
        stored.relative_path = name.format(outside=tmp_path / "other" / "__0_0.distcp")
    (tmp_path / "c" / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="which is no file of the folder"):
        value(tmp_path / "c")


def test_no_link_leads_out(tmp_path):
    for made in ("other", "c"):
        save_value(tmp_path / made, 1.0)
    (tmp_path / "c" / "__0_0.distcp").unlink()
    (tmp_path / "c" / "__0_0.distcp").symlink_to(tmp_path / "other" / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"it is a link.*copy the file itself"):
        value(tmp_path / "c")
    fxpar.export_safetensors(tmp_path / "s", nn.Linear(1, 1), max_file_bytes=1)
    index = tmp_path / "s" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-', '"../s/model-'))
    with pytest.raises(CheckpointError, match="names files outside of the folder"):
        fxpar.load_safetensors(tmp_path / "s", nn.Linear(1, 1))


def test_a_checkpoint_without_checksums_loads_with_a_note(tmp_path, caplog):
    save_value(tmp_path / "c", 3.0)
    assert value(tmp_path / "c") == 3.0 and not caplog.text
    as_before_checksums(tmp_path / "c")
    assert value(tmp_path / "c") == 3.0 and "has no checksums" in caplog.text
    save_value(tmp_path / "c", 4.0)
    assert value(tmp_path / "c") == 4.0 and (tmp_path / "c" / MANIFEST).exists()


# ---- values that the model cannot hold ----


class Counter(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("count", values)


@pytest.mark.parametrize("values, dtype, fits", [
    (torch.tensor([300]), torch.uint8, False), (torch.tensor([-1]), torch.uint8, False), (torch.tensor([44]), torch.uint8, True),
    (torch.tensor([2**24 + 1]), torch.float32, False), (torch.tensor([2**24]), torch.float32, True),
    (torch.tensor([1e30]), torch.float16, False), (torch.tensor([0.1, float("inf")]), torch.float16, True),
    (torch.tensor([2**40]), torch.int32, False), (torch.tensor([True]), torch.int64, True),
])  # fmt: skip
@pytest.mark.parametrize("form", ["checkpoint", "safetensors"])
def test_no_number_becomes_another(form, values, dtype, fits, tmp_path):
    save = fxpar.save_checkpoint if form == "checkpoint" else fxpar.export_safetensors
    save(tmp_path / "c", Counter(values))
    model = Counter(torch.zeros(values.shape, dtype=dtype))
    if fits:
        fxpar.load_checkpoint(tmp_path / "c", model)
        assert torch.equal(model.count, values.to(dtype))
    else:
        with pytest.raises(CheckpointError, match=rf"count is {values.dtype} there and {dtype} in the model, which cannot hold"):
            fxpar.load_checkpoint(tmp_path / "c", model)
        assert not model.count.any()


# ---- what a save removes ----


@pytest.mark.parametrize("names", [[".env", ".git/HEAD"], ["mine.distcp"], ["__9_0.distcp"], [METADATA], [MANIFEST]])
@pytest.mark.parametrize("beside", ["", ".saving", ".previous"])
def test_a_save_removes_only_what_a_save_wrote(names, beside, tmp_path):
    for name in names:
        file = tmp_path / f"c{beside}" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("precious")
    with pytest.raises(CheckpointError, match=r"fxpar did not write|list of files is damaged"):
        save_value(tmp_path / "c", 1.0)
    assert all((tmp_path / f"c{beside}" / name).read_text() == "precious" for name in names)


def test_a_file_that_a_checkpoint_got_later_stays(tmp_path):
    save_value(tmp_path / "c", 1.0)
    (tmp_path / "c" / "__9_0.distcp").write_text("precious")
    with pytest.raises(CheckpointError, match=r"fxpar did not write: __9_0.distcp"):
        save_value(tmp_path / "c", 2.0)
    assert value(tmp_path / "c") == 1.0


def test_a_save_writes_through_no_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "c.saving").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="it is a link"):
        save_value(tmp_path / "c", 1.0)
    assert not os.listdir(tmp_path / "elsewhere")


@pytest.mark.parametrize("path", [".", "", "..", "x/.."])
def test_the_folder_of_the_process_stays(path, tmp_path, monkeypatch):
    (tmp_path / "run" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(CheckpointError, match="the process runs in"):
        save_value(Path(path), 1.0)
    assert os.getcwd() == str(tmp_path / "run")


@pytest.mark.parametrize("path", [None, 3, b"c", "a\0b", "x" * 300, "x" * 250, "y/" * 3000], ids=lambda p: repr(p)[:8])
@pytest.mark.parametrize("call", [fxpar.save_checkpoint, fxpar.load_checkpoint, fxpar.export_safetensors, fxpar.load_safetensors])
def test_what_is_no_path_is_said(call, path):
    with pytest.raises(CheckpointError, match="give the path of a folder") as caught:
        call(path, nn.Linear(1, 1))
    assert len(str(caught.value)) < 500


def test_an_export_replaces_no_model_of_another(tmp_path):
    (tmp_path / SINGLE).write_text("precious")
    with pytest.raises(CheckpointError, match=r"fxpar did not write: model.safetensors"):
        fxpar.export_safetensors(tmp_path, nn.Linear(1, 1))
    assert (tmp_path / SINGLE).read_text() == "precious"


def test_an_export_stays_one_that_others_read(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file

    model = Model(0)
    fxpar.export_safetensors(tmp_path, model)
    assert equal(load_file(tmp_path / SINGLE), dict(model.state_dict()))
    with safe_open(tmp_path / SINGLE, framework="pt") as opened:
        kept = opened.metadata()
    assert kept["format"] == "pt" and json.loads(kept[SUMS]).keys() == model.state_dict().keys()
