"""`OpenedFolder`: a checkpoint that is held open while it is read, whatever happens to its name meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from fxpar import compat
from fxpar.checkpoint import manifest
from fxpar.checkpoint.manifest import MANIFEST, METADATA, Manifest
from fxpar.errors import CheckpointError

HELD = 256
"""How many files are opened at once, when the folder is: a save that replaces it then takes none of them away."""
AGAIN, WHOLE = (f"copy {what}, or load an earlier checkpoint" for what in ("it again", "the whole folder"))


class OpenedFolder:
    """What a folder has, read from the folder itself and not by its name, so that a save that renames it mixes nothing.

    folder: where it is. metadata: what it says it has. summed: whether there are checksums; all that is read is checked
    against them. identity: of the folder, which a rename keeps. digest: equal where two processes opened the same checkpoint.
    Nothing in the folder is run, and no file outside of it is read.
    """

    def __init__(self, folder: Path):
        """Raises: `CheckpointError` if the folder cannot be opened, or what it says of itself is damaged."""
        self.folder = folder
        self._open_files = contextlib.ExitStack()
        self._held: dict[str, BinaryIO] = {}
        try:
            self._at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._open_files.callback(os.close, self._at)
            self.identity = identity_of(os.fstat(self._at))
            for name in sorted(os.listdir(self._at))[:HELD]:
                with contextlib.suppress(CheckpointError):  # raised again where the file is needed
                    self._held[name] = self._open_files.enter_context(self._open(name))
        except OSError as error:
            self.close()
            raise CheckpointError(f"it cannot be opened ({error})", str(folder), AGAIN) from error
        try:
            self._read_metadata()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._open_files.close()

    def __enter__(self) -> OpenedFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- files ----

    def _damaged(self, name: str, what: str, way_out: str = AGAIN) -> CheckpointError:
        return CheckpointError(what, str(self.folder / name), way_out)

    def _open(self, name: str) -> BinaryIO:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise self._damaged(METADATA, f"it names {name!r}, which is no file of the folder")
        try:
            made = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._at)
        except FileNotFoundError:
            raise self._damaged(name, "this data file is missing", WHOLE) from None
        except OSError as error:
            said = "it is a link, which may lead out of the folder" if self._is_link(name) else f"it cannot be read ({error})"
            raise self._damaged(name, said, "copy the file itself there") from error
        if not stat.S_ISREG(os.fstat(made).st_mode):
            os.close(made)
            raise self._damaged(name, "it is no file", WHOLE)
        return open(made, "rb")

    def _is_link(self, name: str) -> bool:
        return stat.S_ISLNK(os.stat(name, dir_fd=self._at, follow_symlinks=False).st_mode)

    @contextlib.contextmanager
    def _file(self, name: str) -> Iterator[BinaryIO]:
        if name in self._held:
            yield self._held[name]
            return
        with self._open(name) as file:
            yield file

    # ---- what it has ----

    def _read_metadata(self) -> None:
        with self._file(METADATA) as file:
            data = file.read()
        self._sums = self._read_manifest()
        self.summed = self._sums is not None
        if self._sums is not None and self._sums.metadata != manifest.of_metadata(data):
            raise self._damaged(METADATA, "it is damaged: it is not what was written, by its checksum")
        try:
            self.metadata: Metadata = compat.read_metadata(data)
            _require_sound(self.metadata)
        except Exception as error:
            raise self._damaged(METADATA, f"it is damaged ({type(error).__name__}: {error})") from error
        self.digest = hashlib.sha256(data + repr(self._sums).encode()).hexdigest()

    def _read_manifest(self) -> Manifest | None:
        if MANIFEST not in self._held and MANIFEST not in os.listdir(self._at):
            return None
        with self._file(MANIFEST) as file:
            try:
                return Manifest.read(file.read())
            except ValueError as error:
                raise self._damaged(MANIFEST, f"it is damaged ({error})") from error

    def check_files(self) -> None:
        """Raises: `CheckpointError` unless every data file is there and long enough."""
        needed: dict[str, int] = {}
        for stored in self.metadata.storage_data.values():
            needed[stored.relative_path] = max(needed.get(stored.relative_path, 0), stored.offset + stored.length)
        for name, size in sorted(needed.items()):
            with self._file(name) as file:
                have = os.fstat(file.fileno()).st_size
            if have < size:
                raise self._damaged(name, f"this data file is truncated: it has {have} bytes of {size}")

    def place(self, name: str, chunk: ChunkStorageMetadata) -> tuple[str, int]:
        """The file in which a rectangle of a tensor is, and where: the order in which to read."""
        stored = self._stored(MetadataIndex(name, chunk.offsets))
        return stored.relative_path, stored.offset

    def tensor(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        """A rectangle of a tensor. Raises: `CheckpointError` if it is damaged."""
        stored = self._stored(MetadataIndex(name, chunk.offsets))
        made = self._loaded(stored, name)
        entry = self.metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        if not isinstance(made, Tensor) or made.layout != torch.strided or made.device.type != "cpu":
            raise self._damaged(stored.relative_path, f"{name} is damaged: it is no tensor")
        if made.shape != chunk.sizes or made.dtype != entry.properties.dtype:
            raise self._damaged(stored.relative_path, f"{name} is damaged: it is {made.dtype} of shape {tuple(made.shape)}, and "
                                                      f"{METADATA} says {entry.properties.dtype} of {tuple(chunk.sizes)}")
        return made

    def value(self, name: str) -> Any:
        """An entry that is no tensor: numbers, text, tensors, and lists and dicts of those."""
        return self._loaded(self._stored(MetadataIndex(name)), name)

    def _stored(self, index: MetadataIndex) -> Any:
        found = self.metadata.storage_data.get(index)
        if found is None:
            raise self._damaged(METADATA, f"it is damaged: it does not say where {index.fqn} is")
        return found

    def _loaded(self, stored: Any, name: str) -> Any:
        data = self._bytes(stored, name)
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise self._damaged(stored.relative_path, f"{name} is damaged, or holds objects that would have to run code "
                                                      f"({type(error).__name__}: {said})") from error

    def _bytes(self, stored: Any, name: str) -> bytes:
        with self._file(stored.relative_path) as file:
            try:
                file.seek(stored.offset)
                data = file.read(min(stored.length, os.fstat(file.fileno()).st_size))
            except OSError as error:
                raise self._damaged(stored.relative_path, f"it cannot be read ({error})") from error
        if len(data) < stored.length:
            raise self._damaged(stored.relative_path, f"this data file is truncated: {name} has {len(data)} bytes of it")
        if self._sums is not None:
            wanted = self._sums.sums.get((stored.relative_path, stored.offset, stored.length))
            if wanted != manifest.of_entry(data):
                raise self._damaged(stored.relative_path, f"{name} is damaged: it is not what was written, by its checksum")
        return data


def identity_of(known: os.stat_result) -> tuple[int, int, int]:
    """What a rename of a folder keeps, and no other folder has: a number is given again when the folder that had it is gone."""
    return known.st_dev, known.st_ino, known.st_mtime_ns


def _require_sound(metadata: Any) -> None:
    """Raises: `TypeError` or `ValueError` unless every field that is read is what it should be."""
    if not isinstance(metadata, Metadata):
        raise TypeError(f"it holds a {type(metadata).__name__}")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
            raise TypeError(f"{name!r} is no entry")
        if isinstance(entry, TensorStorageMetadata):
            if not isinstance(entry.properties.dtype, torch.dtype):
                raise TypeError(f"{name} has no dtype")
            _require_tiled(name, entry)
    for index, stored in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(stored.relative_path, str):
            raise TypeError(f"{index!r} is no place")
        if not _natural(stored.offset) or not _natural(stored.length):
            raise ValueError(f"{index.fqn} is at {stored.offset!r}, {stored.length!r} long")
        if getattr(stored, "transform_descriptors", None):
            raise ValueError(f"{index.fqn} is stored by an extension, {stored.transform_descriptors}")


def _require_tiled(name: str, entry: TensorStorageMetadata) -> None:
    """Rectangles that lie in the tensor and have as many elements as it: together all of it."""
    full = tuple(entry.size)
    volume = 0
    for chunk in entry.chunks:
        start, size = tuple(chunk.offsets), tuple(chunk.sizes)
        if len(start) != len(full) or len(size) != len(full) or not all(map(_natural, (*start, *size))):
            raise ValueError(f"{name} has a part {start} of {size}")
        if any(s + n > f for s, n, f in zip(start, size, full, strict=True)):
            raise ValueError(f"{name} has a part outside of its shape {full}")
        volume += torch.Size(size).numel()
    if volume != torch.Size(full).numel():
        raise ValueError(f"{name} has {volume} elements of the {torch.Size(full).numel()} of its shape {full}")


def _natural(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0
