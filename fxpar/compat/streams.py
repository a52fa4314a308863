"""streams: copies by address on a stream beside the current one, at little cost for the host.

PyTorch's own functions look up the current device and stream in Python, a few microseconds each: more than what they then call
takes. A training step has hundreds of such calls.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

Move = tuple[int, int, int]
"""The address that is written to, the one that is read from, and how many bytes."""


class AtOnce:
    """What a `SideStream` is where there are no streams: copies are made at once, and nothing has to be waited for."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def behind(self) -> None: ...

    def record(self, again: Any = None) -> Any: ...

    def wait(self, event: Any) -> None: ...

    def copy(self, moves: Sequence[Move]) -> None:
        for move in moves:
            ctypes.memmove(*move)


class SideStream:
    """A CUDA stream, which is the current one inside of ``with stream:``, behind what the current one was given before.

    Raises: RuntimeError where the driver's library is not to be found.
    """

    def __init__(self, stream: torch.cuda.Stream):
        self.stream = stream
        self._copy, self._handle = _copies(), ctypes.c_void_p(stream.cuda_stream)
        self._device, self._mine = stream.device_index, _named(stream.stream_id, stream.device_index, stream.device_type)
        self._known: dict[tuple[int, int, int], torch.cuda.Stream] = {}
        self._so_far = torch.cuda.Event()
        self._before: dict[str, int] = {}

    def __enter__(self) -> None:
        self.behind()
        self._before = _named(*torch._C._cuda_getCurrentStream(self._device))
        torch._C._cuda_setStream(**self._mine)

    def __exit__(self, *_: object) -> None:
        torch._C._cuda_setStream(**self._before)

    def behind(self) -> None:
        """What comes next on this stream comes behind what the current one has now."""
        self._so_far.record(self._current())
        self._so_far.wait(self.stream)

    def record(self, again: torch.cuda.Event | None = None) -> torch.cuda.Event:
        """An event behind what this stream has now. again: one that nobody is going to wait for any more."""
        event = torch.cuda.Event() if again is None else again
        event.record(self.stream)
        return event

    def wait(self, event: Any) -> None:
        """What comes next on the current stream comes behind an event."""
        event.wait(self._current())

    def copy(self, moves: Sequence[Move]) -> None:
        """Copies between addresses of memory that this GPU can access, one each."""
        copy, handle = self._copy, self._handle
        for to, source, nbytes in moves:
            if failed := copy(to, source, nbytes, handle):
                raise RuntimeError(f"CUDA error: a copy of {nbytes} bytes failed with {failed}")

    def _current(self) -> torch.cuda.Stream:
        number = torch._C._cuda_getCurrentStream(self._device)
        found = self._known.get(number)
        if found is None:
            found = self._known[number] = torch.cuda.Stream(**_named(*number))
        return found


def _named(stream_id: int, device_index: int, device_type: int) -> dict[str, int]:
    return {"stream_id": stream_id, "device_index": device_index, "device_type": device_type}


@functools.cache
def _copies() -> Callable[..., int]:
    """The driver's function that starts a copy: PyTorch's takes tensors, and thrice as long."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuMemcpyDtoDAsync_v2
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"the CUDA driver's library was not found: {error}") from None
    function.argtypes, function.restype = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p), ctypes.c_int
    return function


def empty_like_code(device: torch.device) -> Callable[..., torch.Tensor]:
    """``empty(shape, strides, dtype)`` on a device, as generated code has it."""
    made = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    return made or functools.partial(_empty_strided, device)


def _empty_strided(device: torch.device, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)
