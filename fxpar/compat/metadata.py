"""metadata: what a folder of `torch.distributed.checkpoint` says of itself, read without running code."""

from __future__ import annotations

import io
import pathlib
import pickle
from typing import Any

import torch

_ALLOWED = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
}  # fmt: skip
"""Everything that the file is made of: records, and two look-ups in tables. No other name of any module is resolved."""
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return pathlib.PurePosixPath  # where it was saved, which nothing reads
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a checkpoint does not consist of")


def read_metadata(data: bytes) -> Any:
    """The object in a ``.metadata`` file: a `Metadata`, if the file is what it should be.

    Raises: `pickle.UnpicklingError`, and what damaged bytes make a pickle raise; nothing outside of `_ALLOWED` is called.
    """
    return _Unpickler(io.BytesIO(data)).load()
