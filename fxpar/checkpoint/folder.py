"""The folder of a checkpoint: replaced as a whole, and nothing removed that no save wrote.

A save writes ``path.saving`` and then renames: ``path`` to ``path.previous``, ``path.saving`` to ``path``. At every moment
one of the three is a whole checkpoint, and `newest` finds it. A folder is whole if it has DCP's ``.metadata``, and no mark
that it is still being written.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from fxpar import compat
from fxpar.checkpoint.manifest import MANIFEST, MARKER, METADATA, Manifest
from fxpar.errors import CheckpointError

_IN_PROGRESS = re.compile(rf"__\d+_\d+\.distcp|{re.escape(METADATA)}(\.tmp)?|{re.escape(MANIFEST)}|{re.escape(MARKER)}")
_MOVE = "move them, or save to another path"


def resolved(path: str | os.PathLike) -> Path:
    """The folder itself, absolute, if `path` is a link to it. Raises: `CheckpointError` for what can be no path."""
    try:
        given = os.fspath(path)
        if not isinstance(given, str) or "\0" in given:
            raise TypeError(f"a path is text without zero bytes, not {given!r}")
        made = Path(given).resolve()
        made.is_dir()
        if len(os.fsencode(made.name)) > 255 - len(".previous"):
            raise ValueError("its name is too long")
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        shown = repr(path)
        raise CheckpointError(f"it is no path that can be used ({error})" if len(str(error)) < 200 else
                              "it is no path that can be used", shown if len(shown) < 200 else f"{shown[:100]}...",
                              "give the path of a folder") from error
    return made


def saving(path: Path) -> Path:
    return path.with_name(path.name + ".saving")


def previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def prepare(path: Path) -> None:
    """Before a save: finish a swap that was interrupted, and remove what a save left half written.

    Raises: `CheckpointError` if anything that would be replaced or removed is not what a save wrote.
    """
    _require_not_here(path)
    for folder in (path, saving(path), previous(path)):
        if folder.is_symlink() or folder.exists():
            _require_ours(folder)
    complete = newest(path)
    if complete is not None and complete != path:
        _rename(complete, path)
    for folder in (saving(path), previous(path)):
        if folder.exists():
            _remove(folder)


def _require_not_here(path: Path) -> None:
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it was removed, and need not be kept
        return
    if path == here or path in here.parents:
        raise CheckpointError("a save replaces the folder, and this one is, or holds, the folder that the process runs in",
                              str(path), "save to a folder in it")


def _require_ours(folder: Path) -> None:
    """Raises: `CheckpointError` unless all that is in the folder was written by a save."""
    if folder.is_symlink():
        raise CheckpointError("it is a link, and a save would write where it leads", str(folder),
                              "remove it, or save to another path")
    if not folder.is_dir():
        raise CheckpointError("it is a file", str(folder), "save to another path")
    with os.scandir(folder) as entries:
        there = {e.name: e.is_file(follow_symlinks=False) for e in entries}
    ours = _written(folder, set(there)) if there else set()
    foreign = sorted(name for name, is_file in there.items() if name not in ours or not is_file)
    if foreign:
        raise CheckpointError(f"a save would replace this folder, but it holds files that fxpar did not "
                              f"write: {', '.join(foreign[:3])}", str(folder), _MOVE)


def _written(folder: Path, there: set[str]) -> set[str]:
    """Of the files in the folder, those that a save wrote: by its mark, its list, or the metadata of one that made no list."""
    if MARKER in there:
        return {name for name in there if _IN_PROGRESS.fullmatch(name)}
    if MANIFEST in there:
        try:
            return Manifest.read((folder / MANIFEST).read_bytes()).files
        except ValueError as error:
            raise CheckpointError(f"its list of files is damaged ({error}), so that a save cannot tell what it may remove",
                                  str(folder / MANIFEST), "move the folder, or save to another path") from error
    try:
        metadata = compat.read_metadata((folder / METADATA).read_bytes())
        if "fxpar" in metadata.state_dict_metadata:
            return {METADATA, *(stored.relative_path for stored in metadata.storage_data.values())}
    except Exception:  # whatever bytes that are no metadata raise: then nothing here is known to be a save's
        return set()
    return set()


def _remove(folder: Path) -> None:
    """Remove what a save wrote, what tells so last; and the folder, unless something else has come into it since."""
    there = set(os.listdir(folder))
    known = (METADATA, MANIFEST, MARKER)
    for name in sorted(_written(folder, there) & there, key=lambda n: (known.index(n) + 1 if n in known else 0, n)):
        os.unlink(folder / name)
    os.rmdir(folder)


def remove(path: Path) -> None:
    """Remove a checkpoint, and what saves to that path have left half written.

    Raises: `CheckpointError` if anything in it is not what a save wrote.
    """
    there = [each for each in (path, saving(path), previous(path)) if each.is_symlink() or each.exists()]
    for each in there:
        _require_ours(each)
    for each in there:
        _remove(each)


def commit(path: Path) -> None:
    """Make the folder that was written the checkpoint."""
    if path.exists():
        _rename(path, previous(path))
    _rename(saving(path), path)
    with contextlib.suppress(OSError, CheckpointError):
        if previous(path).exists():
            _remove(previous(path))


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
    """The newest whole checkpoint: `path`, unless a crash fell between the renames. Where a save is between them, what it has
    written may be at `path` by the time that it is looked for under its other name; `previous(path)` is about to go then."""
    candidates = (path,) if path.exists() else (saving(path), path, previous(path))
    return next((f for f in candidates if (f / METADATA).is_file() and not (f / MARKER).exists()), None)
