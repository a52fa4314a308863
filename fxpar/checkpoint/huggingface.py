"""Safetensors in the layout of Hugging Face: `from_pretrained` reads what is exported, and what it reads can be loaded.

No rank ever holds the whole model: one tensor at a time is gathered, and each file is written by another rank.
"""

from __future__ import annotations

import copy
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fxpar.checkpoint.part import Part
from fxpar.checkpoint.ranks import LocalModel, alike, same, to_cpu
from fxpar.checkpoint.save import finish_running
from fxpar.checkpoint.target import ModelLoad, SavedTensor
from fxpar.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def export_safetensors(path: str | os.PathLike, module: nn.Module, *, max_file_bytes: int = 5 * 2**30) -> None:
    """Write parameters and persistent buffers under their names in the original model, tied ones once, and its config.

    path: a folder that all ranks share. One file, or several of at most `max_file_bytes` (a larger tensor has one of its own)
    with an index. module: a `ParallelModule` (every rank calls), or a plain module.
    Every file appears whole or not at all, the index last. Raises: `CheckpointError`, on all ranks alike.
    """
    finish_running()
    folder, model = Path(path).absolute(), LocalModel(module)
    alike(model.ranks, folder, lambda: model.require_real(folder))
    parts = {n: part for n, part in model.parts().items() if model.counts(n)}
    same(model.ranks, folder, "what they export", (os.fspath(path), max_file_bytes, list(parts)))
    alike(model.ranks, folder, lambda: folder.mkdir(parents=True, exist_ok=True) if model.ranks.rank == 0 else None)
    everyone = model.ranks.exchange((model.kind, {n: _bytes(p) for n, p in parts.items()}))
    planned = _planned(dict(everyone), max_file_bytes)
    for i, file in enumerate(planned):
        writers = [rank for rank, (kind, _) in enumerate(everyone) if kind == file.kind]
        mine = {n: parts[n] for n in file.sizes} if file.kind == model.kind else {}
        _write(folder, file.name, mine, model, writer=writers[i % len(writers)])
    alike(model.ranks, folder, lambda: _publish(folder, planned, model.model) if model.ranks.rank == 0 else None)


@dataclass
class _File:
    """A file, the kind of ranks that hold what is in it, and the bytes of each tensor by its name."""

    name: str
    kind: int
    sizes: dict[str, int]


def _write(folder: Path, file: str, parts: dict[str, Part], model: LocalModel, writer: int) -> None:
    """One file, under a name that nothing reads yet. All ranks that hold its tensors gather, one keeps."""
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():
        full = model.gather(part)
        if model.ranks.rank == writer:
            tensors[name] = to_cpu(full)

    def write() -> None:
        if model.ranks.rank == writer:
            save_file(tensors, _temporary(folder / file), {"format": "pt"})

    alike(model.ranks, folder, write)


def _planned(sizes: dict[int, dict[str, int]], most: int) -> list[_File]:
    """The files, in order. sizes: kind of ranks -> name -> bytes of each tensor that they write."""
    files: list[_File] = []
    for kind, of_kind in sizes.items():
        for name, size in of_kind.items():
            if not files or files[-1].kind != kind or sum(files[-1].sizes.values()) + size > most:
                files.append(_File("", kind, {}))
            files[-1].sizes[name] = size
    files = files or [_File("", 0, {})]
    for i, file in enumerate(files):
        file.name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else SINGLE
    return files


def _bytes(part: Part) -> int:
    return part.shape.numel() * part.local.element_size()


def _temporary(file: Path) -> Path:
    return file.with_name(f".{file.name}.tmp")


def _publish(folder: Path, planned: list[_File], model: nn.Module) -> None:
    """Give the written files their names, remove those of an earlier export, and write the index and the config."""
    for file in planned:
        os.replace(_temporary(folder / file.name), folder / file.name)
    keep = {file.name for file in planned}
    if len(planned) > 1:
        index = {"metadata": {"total_size": sum(sum(file.sizes.values()) for file in planned)},
                 "weight_map": {name: file.name for file in planned for name in file.sizes}}
        _temporary(folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        os.replace(_temporary(folder / INDEX), folder / INDEX)
        keep.add(INDEX)
    for old in folder.iterdir():
        if _OURS.fullmatch(old.name) and old.name not in keep:
            old.unlink()
    config: Any = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        config = copy.deepcopy(config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)


def files(path: Path) -> list[Path]:
    """The safetensors of a model: those its index names, or the single one; `path` itself if it is a file."""
    if path.suffix == ".safetensors":
        return [path]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if (path / INDEX).is_file():
        return sorted({path / f for f in json.loads((path / INDEX).read_text())["weight_map"].values()})
    return sorted(path.glob("*.safetensors"))


def load_safetensors(path: str | os.PathLike, module: nn.Module) -> None:
    """Fill the model's parameters and persistent buffers from safetensors with the model's own names.

    path: a file, or a folder in Hugging Face's layout. Each rank reads only what it holds. Floating dtypes are converted to
    the model's. Either name of a tied tensor will do; a name that a Hugging Face model ignores is skipped.
    Raises: `CheckpointError`, on all ranks alike, before the model is changed.
    """
    finish_running()
    where, model = Path(path).absolute(), LocalModel(module)
    load, places = alike(model.ranks, where, lambda: _prepare(where, model))
    alike(model.ranks, where, lambda: _read(load, places))
    load.install()


def _prepare(where: Path, model: LocalModel) -> tuple[ModelLoad, dict[str, Path]]:
    found = files(where)
    if not found:
        raise CheckpointError("there are no safetensors", str(where), "give the folder that has model.safetensors")
    saved: dict[str, SavedTensor] = {}
    places: dict[str, Path] = {}
    for file in found:
        saved |= _header(file)
        places |= {name: file for name in saved if name not in places}
    ignored = getattr(model.model, "_keys_to_ignore_on_load_unexpected", None) or ()
    spare = {n for n in saved if any(re.search(pattern, n) for pattern in ignored)}
    spare |= {a for names in model.aliases.values() for a in names}
    return ModelLoad(model, saved, where, spare), places


def _header(file: Path) -> dict[str, SavedTensor]:
    """What is in the file, from its header alone; the library checks that the file is as long as that says."""
    if not file.is_file():
        raise CheckpointError("this file is missing", str(file), "copy the whole folder")
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return {n: SavedTensor(tuple(s.get_shape()), _DTYPES.get(s.get_dtype())) for n, s in slices.items()}
    except Exception as error:
        raise CheckpointError(f"this file is damaged or truncated ({error})", str(file), "copy it again") from error


@torch.no_grad()
def _read(load: ModelLoad, places: dict[str, Path]) -> None:
    by_file: dict[Path, list[str]] = {}
    for name in load.parts:
        by_file.setdefault(places[name], []).append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as opened:
            for name in names:
                part = load.parts[name]
                if not part.shape:
                    part.local.copy_(opened.get_tensor(name))
                    continue
                values = opened.get_slice(name)
                for chunk, local in part.chunks():
                    local.copy_(values[tuple(slice(s, s + n) for s, n in zip(chunk.start, chunk.size, strict=True))])
