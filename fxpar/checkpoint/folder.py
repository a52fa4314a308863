"""The folder of a checkpoint: replaced as a whole, and looked over before anything is read.

A save writes ``path.saving`` and then renames: ``path`` to ``path.previous``, ``path.saving`` to ``path``. At every moment
one of the three is a whole checkpoint, and `newest` finds it. A folder is whole if it has DCP's ``.metadata``, which is
written last.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from fxpar.errors import CheckpointError

METADATA = ".metadata"


def resolved(path: str | os.PathLike) -> Path:
    """The folder itself, if `path` is a link to it."""
    given = Path(path).absolute()
    return given.resolve() if given.is_symlink() else given


def saving(path: Path) -> Path:
    return path.with_name(path.name + ".saving")


def previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def prepare(path: Path) -> None:
    """Before a save: finish a swap that was interrupted, and remove what a save left half written.

    Raises: `CheckpointError` if anything that would be replaced or removed is not a checkpoint.
    """
    for folder in (path, saving(path), previous(path)):
        _require_ours(folder)
    complete = newest(path)
    if complete is not None and complete != path:
        _rename(complete, path)
    for folder in (saving(path), previous(path)):
        if folder.exists():
            shutil.rmtree(folder)


def _require_ours(folder: Path) -> None:
    """Nothing but what checkpoints consist of is ever removed."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError("it is a file", str(folder), "save to another path")
    foreign = [] if not folder.exists() else sorted(f.name for f in folder.iterdir()
                                                    if f.suffix != ".distcp" and not f.name.startswith("."))
    if foreign:
        raise CheckpointError(f"a save would replace this folder, but it holds files that are not a checkpoint's: "
                              f"{', '.join(foreign[:3])}", str(folder), "move them, or save to another path")


def commit(path: Path) -> None:
    """Make the folder that was written the checkpoint."""
    if path.exists():
        _rename(path, previous(path))
    _rename(saving(path), path)
    shutil.rmtree(previous(path), ignore_errors=True)


def _rename(source: Path, target: Path) -> None:
    """Rename, durably where the file system can say so."""
    os.rename(source, target)
    with contextlib.suppress(OSError):
        parent = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def newest(path: Path) -> Path | None:
    """The newest whole checkpoint: `path`, unless a crash fell between the renames."""
    candidates = (path,) if path.exists() else (saving(path), previous(path))
    return next((f for f in candidates if (f / METADATA).is_file()), None)


def read_metadata(folder: Path) -> Metadata:
    """What the checkpoint says it has. Raises: `CheckpointError` if that cannot be read."""
    try:
        metadata = FileSystemReader(folder).read_metadata()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise TypeError(f"it holds a {type(metadata).__name__}")
    except Exception as error:
        raise CheckpointError(f"it is damaged ({type(error).__name__}: {error})", str(folder / METADATA),
                              "load an earlier checkpoint") from error
    return metadata


def check_files(folder: Path, metadata: Metadata) -> None:
    """Raises: `CheckpointError` unless every data file is there and long enough."""
    needed: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        needed[stored.relative_path] = max(needed.get(stored.relative_path, 0), stored.offset + stored.length)
    for name, size in sorted(needed.items()):
        file = folder / name
        have = file.stat().st_size if file.is_file() else None
        if have is None:
            raise CheckpointError("this data file is missing", str(file), "copy the whole folder, or load an earlier checkpoint")
        if have < size:
            raise CheckpointError(f"this data file is truncated: it has {have} bytes of {size}", str(file),
                                  "copy it again, or load an earlier checkpoint")
