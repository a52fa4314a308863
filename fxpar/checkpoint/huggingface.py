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

from fxpar.checkpoint import staged
from fxpar.checkpoint.folder import resolved
from fxpar.checkpoint.manifest import of_entry
from fxpar.checkpoint.part import Part
from fxpar.checkpoint.ranks import LocalModel, alike, listed, place, require_alike, same, to_cpu, together
from fxpar.checkpoint.save import finish_running
from fxpar.checkpoint.target import ModelLoad, SavedTensor
from fxpar.errors import CheckpointError
from fxpar.progress import stage

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SUMS, OF_SUMS = "fxpar.checksums", "fxpar.checksum"
"""Entries of a file's own metadata: they have a checksum of each tensor, and one of those; they show that an export wrote it."""
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
    Every file appears whole or not at all, the index last, with checksums that `load_safetensors` checks and others skip.
    Files of an earlier export are replaced. Raises: `CheckpointError`, on all ranks alike; also if the folder has safetensors
    of a model that fxpar did not write.
    """
    given = {"path": place(path), "max_file_bytes": max_file_bytes}
    with stage(f"exporting to {path}"), together("export_safetensors", module, given):
        finish_running()
        _export(path, LocalModel(module), max_file_bytes)


def _export(path: str | os.PathLike, model: LocalModel, max_file_bytes: int) -> None:
    folder = alike(model.ranks, path, lambda: resolved(path))
    alike(model.ranks, folder, lambda: model.require_real(folder))
    require_alike(model, folder)
    parts = {n: part for n, part in model.parts().items() if model.counts(n)}
    same(model.ranks, folder, "what they export", {n: tuple(part.shape) for n, part in parts.items()})
    alike(model.ranks, folder, lambda: _make_room(folder) if model.ranks.rank == 0 else None)
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
            sums = json.dumps({name: _sum(tensor) for name, tensor in tensors.items()})
            _temporary(folder / file).unlink(missing_ok=True)  # it might be a link
            save_file(tensors, _temporary(folder / file), {"format": "pt", SUMS: sums, OF_SUMS: of_entry(sums.encode())})

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


def _sum(tensor: Tensor) -> str:
    """A checksum of what a tensor is: its numbers, dtype and shape."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype}{list(tensor.shape)}:{of_entry(data)}"


def _make_room(folder: Path) -> None:
    """Make the folder. Raises: `CheckpointError` if it has a model's files that no export wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    foreign = sorted(f.name for f in folder.iterdir() if _OURS.fullmatch(f.name) and not _exported(f))
    if foreign:
        raise CheckpointError(f"an export would replace files that fxpar did not write: {listed(foreign)}", str(folder),
                              "move them, or export to another folder")


def _exported(file: Path) -> bool:
    """Whether an export wrote the file."""
    try:
        if file.name == INDEX:
            return SUMS in json.loads(file.read_text())["metadata"]
        with safe_open(file, framework="pt") as opened:
            return SUMS in (opened.metadata() or {})
    except Exception:  # whatever a file raises that is none of these
        return False


def _temporary(file: Path) -> Path:
    return file.with_name(f".{file.name}.tmp")


def _publish(folder: Path, planned: list[_File], model: nn.Module) -> None:
    """Give the written files their names, remove those of an earlier export, and write the index and the config."""
    for file in planned:
        os.replace(_temporary(folder / file.name), folder / file.name)
    keep = {file.name for file in planned}
    if len(planned) > 1:
        index = {"metadata": {"total_size": sum(sum(file.sizes.values()) for file in planned), SUMS: "in the files"},
                 "weight_map": {name: file.name for file in planned for name in file.sizes}}
        _temporary(folder / INDEX).unlink(missing_ok=True)
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
        return sorted({path / name for name in _indexed(path / INDEX)})
    return sorted(path.glob("*.safetensors"))


def _indexed(index: Path) -> list[str]:
    """The names of files that an index has, all of which are in its folder."""
    try:
        names = list(json.loads(index.read_text())["weight_map"].values())
        if not all(isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\0"} for name in names):
            raise ValueError("it names files outside of the folder")
        return names
    except Exception as error:
        raise CheckpointError(f"it is damaged ({type(error).__name__}: {error})", str(index), "copy it again") from error


def load_safetensors(path: str | os.PathLike, module: nn.Module) -> None:
    """Fill the model's parameters and persistent buffers from safetensors with the model's own names.

    path: a file, or a folder in Hugging Face's layout. module: a `ParallelModule` (every rank calls; it may have been made on the
    meta device), or a plain module. Each rank reads only what it holds. Floating dtypes are converted to
    the model's. Either name of a tied tensor will do; a name that a Hugging Face model ignores is skipped.
    Everything is read, and checked against the checksums of `export_safetensors` where there are any, before the model is written
    to: for that each rank needs memory on the host for its part of the model.
    Raises: `CheckpointError`, on all ranks alike, before the model is changed.
    """
    with stage(f"loading {path}"), together("load_safetensors", module, {"path": place(path)}):
        finish_running()
        _load(path, LocalModel(module))


def _load(path: str | os.PathLike, model: LocalModel) -> None:
    where = alike(model.ranks, path, lambda: resolved(path))
    load, places = alike(model.ranks, where, lambda: _prepare(where, model))
    made = staged.stage(load.parts)
    alike(model.ranks, where, lambda: _check(sorted(set(places.values())), model))
    alike(model.ranks, where, lambda: _read({name: each.part for name, each in made.items()}, places))
    staged.fill(made.values())
    load.install()


def _prepare(where: Path, model: LocalModel) -> tuple[ModelLoad, dict[str, Path]]:
    found = files(where)
    if not found:
        raise CheckpointError("there are no safetensors", str(where), "give the folder that has model.safetensors")
    saved: dict[str, SavedTensor] = {}
    places: dict[str, Path] = {}
    for file in found:
        of_file = _header(file)
        twice = saved.keys() & of_file.keys()
        if twice:
            raise CheckpointError(f"{min(twice)} is in two files, {places[min(twice)].name} is the other", str(file),
                                  "keep one of them")
        saved |= of_file
        places |= dict.fromkeys(of_file, file)
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


def _check(found: list[Path], model: LocalModel) -> None:
    """Check this rank's share of all tensors against the checksums in their files."""
    number = 0
    for file in found:
        with safe_open(file, framework="pt") as opened:
            said = opened.metadata() or {}
            if SUMS not in said and OF_SUMS not in said:
                continue
            if SUMS not in said or said.get(OF_SUMS) != of_entry(said[SUMS].encode()):
                raise CheckpointError("its checksums are damaged", str(file), "copy it again")
            sums = json.loads(said[SUMS])
            for name in sorted({*opened.keys(), *sums}):
                number += 1
                if number % model.ranks.world != model.ranks.rank:
                    continue
                if name not in opened.keys() or _sum(opened.get_tensor(name)) != sums.get(name):
                    raise CheckpointError(f"{name} is damaged: it is not what was written, by its checksum", str(file),
                                          "copy it again")


def _read(parts: dict[str, Part], places: dict[str, Path]) -> None:
    by_file: dict[Path, list[str]] = {}
    for name in parts:
        by_file.setdefault(places[name], []).append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as opened:
            for name in names:
                local = parts[name].local
                if not parts[name].shape:
                    local.copy_(staged.converted(opened.get_tensor(name), local.dtype, name, file))
                    continue
                values = opened.get_slice(name)
                for chunk, part in parts[name].chunks():
                    read = values[tuple(slice(s, s + n) for s, n in zip(chunk.start, chunk.size, strict=True))]
                    part.copy_(staged.converted(read, local.dtype, name, file))
