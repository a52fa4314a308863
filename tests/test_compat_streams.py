"""What compat/streams.py does with PyTorch's private parts: a stream beside the current one, copies by address."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from fxpar import compat
from fxpar.compat import streams


def test_copies_at_once_go_by_address():
    """`compat.AtOnce`, `compat.Move`"""
    x, y = torch.arange(12.0), torch.zeros(12)
    compat.AtOnce().copy([(y.data_ptr() + 8, x.data_ptr() + 4, 12), (y.data_ptr(), x.data_ptr(), 4)])
    assert y.tolist() == [0, 0, 1, 2, 3, *[0] * 7]


class Cuda:
    """What a `SideStream` calls, in order. on: which stream is the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[tuple] = []
        self.on = (7, 0, 1)
        calls = self.calls

        class Event:
            def record(self, stream) -> None:
                calls.append(("record", stream.stream_id))

            def wait(self, stream) -> None:
                calls.append(("wait", stream.stream_id))

        def set_stream(**named: int) -> None:
            self.on = tuple(named.values())

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", lambda **named: SimpleNamespace(**named))
        monkeypatch.setattr(torch._C, "_cuda_getCurrentStream", lambda device: self.on, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_setStream", set_stream, raising=False)
        monkeypatch.setattr(streams, "_copies", lambda: self.copy)

    def copy(self, to: int, source: int, nbytes: int, handle: ctypes.c_void_p) -> int:
        self.calls.append(("copy", to, source, nbytes, handle.value))
        return 700 * (nbytes == 0)


def test_a_side_stream_is_the_current_one_behind_what_was_current(monkeypatch):
    cuda = Cuda(monkeypatch)
    beside = compat.SideStream(SimpleNamespace(stream_id=3, device_index=0, device_type=1, cuda_stream=44))
    with beside:
        assert cuda.on == (3, 0, 1)
        beside.copy([(1, 2, 30), (4, 5, 60)])
    assert cuda.on == (7, 0, 1)
    beside.wait(beside.record())
    assert cuda.calls == [("record", 7), ("wait", 3), ("copy", 1, 2, 30, 44), ("copy", 4, 5, 60, 44), ("record", 3), ("wait", 7)]
    cuda.on = (8, 0, 1)  # another stream is current now
    event = beside.record()
    assert beside.record(event) is event
    beside.wait(event)
    assert cuda.calls[-1] == ("wait", 8)
    with pytest.raises(RuntimeError, match="failed with 700"):
        beside.copy([(1, 2, 0)])


def test_without_a_driver_there_are_no_copies(monkeypatch):
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    with pytest.raises(RuntimeError, match="the CUDA driver's library was not found"):
        streams._copies.__wrapped__()


def test_memory_is_made_as_generated_code_has_it():
    made = compat.empty_like_code(torch.device("cpu"))((2, 3), (3, 1), torch.bfloat16)
    other = compat.empty_like_code(torch.device("meta"))((2, 3), (1, 2), torch.float32)
    assert (made.shape, made.stride(), made.dtype) == ((2, 3), (3, 1), torch.bfloat16)
    assert other.is_meta and other.stride() == (1, 2)


@pytest.mark.gpu
def test_copies_on_a_side_stream_are_in_order():
    beside, current = compat.SideStream(torch.cuda.Stream(priority=-1)), torch.cuda.current_stream()
    x, y = torch.zeros(2**24, device="cuda"), torch.zeros(2**24, device="cuda")
    for turn in range(20):
        torch.cuda._sleep(10**6)
        x.fill_(turn)
        with beside:
            assert torch.cuda.current_stream() != current
            half = x.nbytes // 2
            beside.copy([(y.data_ptr(), x.data_ptr(), half), (y.data_ptr() + half, x.data_ptr(), half)])
        assert torch.cuda.current_stream() == current
        beside.wait(beside.record())
        assert (y == turn).all()
