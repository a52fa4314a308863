"""The list of what a save wrote, with checksums: it says what may be removed, and whether what is read is what was written.

``.fxpar.json`` stands beside DCP's ``.metadata``, which has no room for it. While a folder is written it has ``.fxpar.saving``
instead. Checksums find damage; they are no signature.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

METADATA, MANIFEST, MARKER = ".metadata", ".fxpar.json", ".fxpar.saving"
FORMAT = 1


@dataclass
class Manifest:
    """metadata: checksum of the file ``.metadata``. sums: of every stored entry, by (file, offset, length) in bytes."""

    metadata: str
    sums: dict[tuple[str, int, int], str] = field(default_factory=dict)

    @property
    def files(self) -> set[str]:
        """The names of all files that the save left."""
        return {METADATA, MANIFEST, *(file for file, _, _ in self.sums)}

    def text(self) -> str:
        files: dict[str, list] = {}
        for (file, offset, length), made in sorted(self.sums.items()):
            files.setdefault(file, []).append([offset, length, made])
        return json.dumps({"format": FORMAT, "metadata": self.metadata, "files": files})

    @classmethod
    def read(cls, text: bytes) -> Manifest:
        """Raises: `ValueError` for anything that `text` has not made."""
        try:
            given = json.loads(text)
            if given["format"] != FORMAT:
                raise ValueError(f"format {given['format']!r} instead of {FORMAT}")
            made = cls(given["metadata"], {(file, offset, length): summed for file, entries in given["files"].items()
                                           for offset, length, summed in entries})
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if not all(isinstance(n, int) for _, *numbers in made.sums for n in numbers):
            raise ValueError("an offset is no number")
        return made


def of_metadata(data: bytes) -> str:
    """The checksum of the file that says what all others hold."""
    return hashlib.sha256(data).hexdigest()


def of_entry(data: Any) -> str:
    """The checksum of an entry; fast, because a checkpoint is large."""
    return f"{zlib.crc32(data):08x}"


@dataclass(frozen=True)
class _Summed(WriteResult):
    """An entry that a rank has written, on its way to the rank that lists them."""

    checksum: str


class Writer(FileSystemWriter):
    """Marks the folder as one of fxpar's before anything is in it, and lists its files when everything is."""

    def __init__(self, folder: Path):
        # Copying ahead on a stream of the current device would open that device in a background thread.
        super().__init__(folder, per_thread_copy_ahead=0)
        self.folder = folder

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On one rank, when the folder is there and no rank writes yet."""
        durably(self.folder / MARKER, b"")
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written = super().write_data(plan, planner).wait()
        done: Future[list[WriteResult]] = Future()
        done.set_result(list(self._summed(written)))
        return done

    def _summed(self, written: list[WriteResult]) -> Iterable[WriteResult]:
        by_file: dict[str, list[WriteResult]] = {}
        for result in written:
            by_file.setdefault(result.storage_data.relative_path, []).append(result)
        for name, results in by_file.items():
            with open(self.folder / name, "rb") as file:
                for result in sorted(results, key=lambda r: r.storage_data.offset):
                    file.seek(result.storage_data.offset)
                    made = of_entry(file.read(result.storage_data.length))
                    yield _Summed(result.index, result.size_in_bytes, result.storage_data, made)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        listed = Manifest(of_metadata((self.folder / METADATA).read_bytes()))
        everything: Iterable[Any] = (result for of_rank in results for result in of_rank)
        for result in everything:
            at = result.storage_data
            listed.sums[at.relative_path, at.offset, at.length] = result.checksum
        durably(self.folder / MANIFEST, listed.text().encode())
        os.unlink(self.folder / MARKER)


def durably(file: Path, data: bytes) -> None:
    """Write a file that is not there yet."""
    with open(file, "xb") as made:
        made.write(data)
        made.flush()
        os.fsync(made.fileno())
