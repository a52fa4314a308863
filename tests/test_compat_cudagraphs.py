"""What compat/cudagraphs.py does with PyTorch's private parts: codes of AOTAutograd, memory that is lent, graphs of a GPU."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, fx, nn

from fxpar import compat


class Noted:
    """A recorder that runs codes as they are, and notes what it is given."""

    def __init__(self) -> None:
        self.notes: list[tuple] = []

    def takes(self, inputs, more=0) -> None:
        self.notes.append(("takes", tuple(inputs)))

    def forward(self, code: compat.Code, returned: int) -> compat.Code:
        def run(inputs):
            outs = code(inputs)
            self.notes.append(("forward", returned, len(outs) > returned))
            return outs

        return run

    def backward(self, code):
        def run(inputs):
            count = len(inputs)
            outs = code(inputs)
            self.notes.append(("backward", count > 1, len([x for x in outs if x is not None])))
            return outs

        return run

    def alone(self, code):
        def run(inputs):
            self.notes.append(("alone", len(inputs)))
            return code(inputs)

        return run


class Net(nn.Module):
    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor]:
        return ((x @ w).sin().square().mean(),)


def traced() -> tuple[fx.GraphModule, list[Tensor]]:
    return fx.symbolic_trace(Net()), [torch.randn(3, 4), torch.randn(4, 5, requires_grad=True)]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_recorder_runs_forward_and_backward(compiled):
    noted: compat.CodeRecorder = Noted()
    module, inputs = traced()
    run = compat.compile_graph(module, inputs, recorder=noted) if compiled else \
        compat.partition_eagerly(module, inputs, lambda graph: None, recorder=noted)
    for _ in range(2):
        (loss,) = run(*inputs)
        (grad,) = torch.autograd.grad(loss, inputs[1])
    (want,) = torch.autograd.grad(Net()(*inputs)[0], inputs[1])
    torch.testing.assert_close(grad, want)
    assert noted.notes == [("forward", 1, True), ("backward", True, 1)] * 2


def test_a_recorder_runs_what_has_no_backward():
    noted, (module, inputs) = Noted(), traced()
    with torch.no_grad():
        run = compat.compile_graph(module, inputs, recorder=noted)
        torch.testing.assert_close(run(*inputs)[0], Net()(*inputs)[0])
    assert noted.notes == [("alone", 2)]


def test_memory_is_lent():
    x = torch.arange(12.0)
    storage = compat.storage_at(x.data_ptr(), 48, x.device)
    assert compat.holders(storage) == 0
    part = compat.tensor_in(storage, 2, (2, 3), (3, 1), torch.float32)
    assert compat.holders(storage) == 1 and torch.equal(part, x[2:8].view(2, 3)) and not part._is_view()
    assert compat.storage_of(part) == compat.storage_number(storage)
    node = (part.requires_grad_() * 2).sin()
    del part
    assert compat.holders(storage) == 1
    del node
    gc.collect()
    assert compat.holders(storage) == 0


def test_whether_a_graph_is_kept_and_where_tensors_are_saved():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x.sin()
    y.register_hook(lambda grad: seen.append(compat.keeps_graph()))
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert seen == [True, False] and not compat.saves_elsewhere()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert compat.saves_elsewhere()


@pytest.mark.gpu
def test_a_gpu_records_and_plays_back():
    device = torch.device("cuda", torch.cuda.current_device())
    graphs = compat.CudaGraphs(device)
    x, w = torch.randn(64, 64, device=device), torch.randn(64, 64, device=device)
    for _ in range(2):
        (x @ w).relu()
    (y,), play = graphs.record(lambda inputs: [(inputs[0] @ inputs[1]).relu()], [x, w])
    play()
    assert torch.equal(y, (x @ w).relu())
    x.normal_()
    play()
    assert torch.equal(y, (x @ w).relu())
    made, host, gpu = graphs.timed(lambda: x @ w)
    assert torch.equal(made, x @ w) and host > 0 and gpu() > 0 and graphs.occupied() is None
    before = graphs.drawn()
    torch.rand(4, device=device)
    assert graphs.drawn() != before and graphs.most() >= graphs.taken() >= graphs.alive() > 0
    storage = compat.storage_at(y.data_ptr(), y.nbytes, device)
    lent = compat.tensor_in(storage, 0, y.shape, y.stride(), y.dtype)
    assert torch.equal(lent, y) and compat.holders(storage) == 1


@pytest.mark.gpu
def test_memory_for_another_stream_is_taken_while_one_is_recorded():
    graphs = compat.CudaGraphs(torch.device("cuda", torch.cuda.current_device()))
    made: list[Tensor] = []

    def code(inputs: list[Tensor]) -> list[Tensor]:
        for _ in range(3):  # none of which is at hand
            with compat.unrecorded(torch.cuda.Stream()):
                made.append(torch.empty(2**22, device="cuda"))
        return [inputs[0] + 1]

    x = torch.ones(8, device="cuda")
    (y,), play = graphs.record(code, [x])
    for t in made:
        t.zero_()
    play()
    assert torch.equal(y, x + 1) and all(not t.any() for t in made)


@pytest.mark.gpu
def test_another_has_a_pool_of_its_own():
    graphs = compat.CudaGraphs(torch.device("cuda", torch.cuda.current_device()))
    other, x = graphs.another(), torch.zeros(8, device="cuda")
    (one,), play = graphs.record(lambda given: [given[0] + 1], [x])
    play()
    address = one.data_ptr()
    del one
    (two,), play_other = other.record(lambda given: [given[0] + 2], [x])
    play_other()
    assert two.data_ptr() != address and torch.equal(two, x + 2)


@pytest.mark.gpu
def test_a_recording_that_breaks_off_leaves_nothing():
    device = torch.device("cuda", torch.cuda.current_device())
    graphs, stream = compat.CudaGraphs(device), torch.cuda.current_stream()
    x = torch.ones(8, device=device)
    with pytest.raises(RuntimeError):
        graphs.record(lambda inputs: [inputs[0] * (inputs[0] + 1).sum().item()], [x])
    with pytest.raises(ValueError, match="mine"):
        graphs.record(_fails, [x])
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    (y,), play = graphs.record(lambda inputs: [inputs[0] * 3], [x])
    play()
    torch.cuda.synchronize()
    assert y.sum().item() == 24 and torch.ones(1 << 20, device=device).sum().item() == 1 << 20


def _fails(inputs: list[Tensor]) -> list[Tensor]:
    inputs[0] + 1
    raise ValueError("mine")
