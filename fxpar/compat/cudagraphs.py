"""cudagraphs: CUDA graphs around the code that AOTAutograd runs, and memory that is lent out of them."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor

from fxpar.compat.steps import Code


class CodeRecorder(Protocol):
    """What is put around the code of one compiled graph."""

    def takes(self, inputs: Sequence[int], more: int = 0) -> None:
        """Which of the program's inputs the code takes, in order; behind them it takes so many more, always the same."""

    def forward(self, code: Code, returned: int) -> Code:
        """The code to be run for a forward, whose first `returned` outputs go to its caller, and the others to its backward."""

    def backward(self, code: Code) -> Code:
        """The code to be run for a backward, which takes what the forward left, and then gradients."""

    def alone(self, code: Code) -> Code:
        """The code to be run for a graph without a backward, all of whose outputs go to its caller."""


@contextlib.contextmanager
def recorded_by(recorder: CodeRecorder | None) -> Iterator[None]:
    """Inside, AOTAutograd makes functions whose forward and backward are those of `recorder`. A backward that is compiled later
    is not seen: whoever compiles it hands it to the recorder."""
    from torch._functorch._aot_autograd.runtime_wrappers import AOTDispatchAutograd

    if recorder is None:
        yield
        return
    original: Any = AOTDispatchAutograd.post_compile

    def made(forward: Any, backward: Any, metadata: Any) -> tuple[Any, Any]:
        return boxed(recorder.forward(forward, metadata.num_forward_returns)), \
            None if backward is None else boxed(recorder.backward(backward))

    @functools.wraps(original)
    def post_compile(first: Any, *args: Any, **kwargs: Any) -> Any:
        if dataclasses.is_dataclass(first):  # torch >= 2.12
            spec: Any = first
            forward, backward = made(spec.compiled_fw_func, spec.compiled_bw_func, spec.fw_metadata)
            changed: Any = dataclasses.replace(spec, compiled_fw_func=forward, compiled_bw_func=backward)
            return original(changed, *args, **kwargs)
        forward, backward = made(first, args[0], kwargs["fw_metadata"])
        return original(forward, backward, *args[1:], **kwargs)

    with mock.patch.object(AOTDispatchAutograd, "post_compile", staticmethod(post_compile)):
        yield


def boxed(code: Code) -> Code:
    """Tell AOTAutograd that `code` takes its inputs as a list, which it empties."""

    def run(inputs: list[Any]) -> Any:
        return code(inputs)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def recorded_output(made: Any, recorder: CodeRecorder) -> Any:
    """What Inductor made of a backward, which `recorder` runs; still what is kept on disk."""
    made.current_callable = recorder.backward(made.current_callable)
    return made


def alone(compiled: Callable[..., Any], recorder: CodeRecorder) -> Callable[..., Any]:
    """A function over tensors that no gradient is asked of, which `recorder` runs."""
    code = recorder.alone(lambda inputs: compiled(*inputs))
    return lambda *inputs: code(list(inputs))


# ---- memory that is lent ----


def storage_at(address: int, nbytes: int, device: torch.device) -> Any:
    """A storage over memory that somebody else keeps."""
    return torch._C._construct_storage_from_data_pointer(address, device, nbytes)


def tensor_in(storage: Any, offset: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor over a part of a storage, which is no view of another; offset: in elements."""
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, shape, strides)


def storage_number(storage: Any) -> int:
    """`storage_of` of its tensors."""
    return storage._cdata


def holders(storage: Any) -> int:
    """How many tensors there are in a storage of `storage_at`, of which its maker has none."""
    return torch._C._storage_Use_Count(storage._cdata) - 1


def keeps_graph() -> bool:
    """Whether the backward pass under way may be followed by another one (``retain_graph``)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def saves_elsewhere() -> bool:
    """Whether hooks decide where autograd keeps what it saves (``torch.autograd.graph.saved_tensors_hooks``)."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


# ---- the device ----

_RELAXED = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED."""


@contextlib.contextmanager
def unrecorded(stream: torch.cuda.Stream) -> Iterator[None]:
    """Inside, `stream` is the current one, and memory can be taken from the device for it while another one is recorded.

    PyTorch asks CUDA's driver for this by itself where it takes memory for the stream that is recorded, and for no other one.
    """
    exchange = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    mode = ctypes.c_int(_RELAXED)  # what it was before is written here
    exchange(ctypes.byref(mode))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        exchange(ctypes.byref(mode))


class Playback:
    """A recorded graph, which is played back when this is called. holds: a graph that holds the memory of the pool."""

    def __init__(self, graph: torch.cuda.CUDAGraph, holds: torch.cuda.CUDAGraph):
        self._graph, self._holds = graph, holds

    def __call__(self) -> None:
        self._graph.replay()

    def forget(self) -> None:
        """Give the graph up: it is not played back any more. What lies in its memory stays as long as this object does."""
        self._graph.reset()


class CudaGraphs:
    """Records what is run on one GPU. All recordings have one pool of memory, of which no two are to be in use at once.

    beside: a stream that is never recorded.

    A communicator of NCCL that was recorded ends only when the graph is gone: until then `destroy_process_group` waits. So
    whoever has a `Playback` must forget it before. The memory of the pool stays as long as there is one.
    """

    def __init__(self, device: torch.device):
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")  # memory of a recording may be given back before NCCL ends
        self.device = device
        self.beside: torch.cuda.Stream | None = torch.cuda.Stream(device)
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._holds: weakref.ref[torch.cuda.CUDAGraph] | None = None

    def another(self) -> CudaGraphs:
        """One with a pool of its own."""
        return CudaGraphs(self.device)

    def record(self, code: Code, inputs: list[Tensor]) -> tuple[list[Any], Playback]:
        """What `code` makes of `inputs`, a list that is emptied, as memory to which what is returned writes it. Nothing has run
        before that is called.

        Raises what `code` raises, and RuntimeError where it does what cannot be recorded. Then nothing is left of it.
        """
        holds = self._holds() if self._holds is not None else None
        if self._pool is None or holds is None:
            self._stream, self._pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
            holds = torch.cuda.CUDAGraph()
            with torch.cuda.graph(holds, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                torch.zeros(1, device=self.device)
            self._holds = weakref.ref(holds)
        graph, before, collects = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device), gc.isenabled()
        gc.collect()
        gc.disable()  # what a collection frees might do what cannot be recorded
        failure: BaseException | None = None
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    made = list(code(inputs))
                except BaseException as error:
                    failure = error
                    raise
        except BaseException as error:
            torch.cuda.set_stream(before)
            with contextlib.suppress(RuntimeError):  # it has ended already
                torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
            self._stream = self._pool = None
            raise failure or error from None
        finally:
            if collects:
                gc.enable()
        return made, Playback(graph, holds)

    def timed(self, run: Callable[[], Any]) -> tuple[Any, float, Callable[[], float]]:
        """What ``run()`` returns, its seconds on the host, and what waits for those on the GPU."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        start = time.perf_counter()
        made = run()
        host = time.perf_counter() - start
        end.record()

        def on_gpu() -> float:
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return made, host, on_gpu

    def most(self) -> int:
        """The most bytes that this process has had of the device's memory."""
        return torch.cuda.max_memory_reserved(self.device)

    def taken(self) -> int:
        """The bytes that it has now."""
        return torch.cuda.memory_reserved(self.device)

    def size(self) -> int:
        """The bytes that the device has."""
        return torch.cuda.get_device_properties(self.device).total_memory

    def alive(self) -> int:
        """The bytes that tensors have now; what is lent of recordings does not count."""
        return torch.cuda.memory_allocated(self.device)

    def give_back(self) -> None:
        """Have what is cached and free used by others."""
        torch.cuda.empty_cache()

    def drawn(self) -> int:
        """Changes when random numbers are drawn by PyTorch's generator."""
        return torch.cuda.default_generators[self.device.index].get_offset()

    def occupied(self) -> str | None:
        """Why nothing is to be recorded or replayed now."""
        if torch.cuda.is_current_stream_capturing():
            return "the caller records a CUDA graph"
        return None
