"""`fxpar.compat`: generated code as it runs from its second time on."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxpar import compat
from fxpar.compat import quick, stages

CODE = """
import torch
from torch._C._dynamo.guards import assert_size_stride

class Runner:
    def call(self, args):
        x, = args
        args.clear()
        assert_size_stride(x, (2, 3), (3, 1), 'input')
        if True:
            buf0 = torch.ops.aten.add.Tensor(x, self.one)
            assert_size_stride(buf0, (2, 3), (3, 1), 'torch.ops.aten.add.Tensor')
            buf1 = torch.ops.quicktest.twice.default(torch.ops.quicktest.twice.default(buf0), 'group')
            torch.ops.quicktest.other.default(buf1)
        return (buf1, )
"""


@pytest.fixture
def generated(tmp_path: Path):
    """What a `CompiledFxGraph` is: with the method of a module that was generated."""
    file = tmp_path / "generated.py"
    file.write_text(CODE)
    spec = importlib.util.spec_from_file_location("generated", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    runner = module.Runner()
    runner.one = torch.ones(())
    return SimpleNamespace(current_callable=runner.call)


def test_a_quick_body_calls_functions_and_asserts_nothing(generated, monkeypatch):
    monkeypatch.setattr(quick, "_direct", {})
    made: list[list[tuple]] = []

    def make():
        made.append([])

        def twice(x: Tensor, *more: str) -> Tensor:
            made[-1 if more else -2].append((x.shape, *more))
            return 2 * x

        return twice

    compat.call_directly("quicktest.twice", make)
    compat.call_directly("quicktest.other", lambda: lambda x: None)
    run = quick.quick(generated)
    with pytest.raises(AssertionError):
        generated.current_callable([torch.zeros(4, 3)])
    inputs = [torch.zeros(4, 3)]
    (result,) = run(inputs)
    assert inputs == [] and (result == 4).all()
    assert [len(calls) for calls in made] == [1, 1] and made[1][0] == (result.shape, "group")  # one function for each place


def test_copies_of_what_is_not_aligned_stay(generated, monkeypatch):
    from torch._inductor.utils import align_inputs_from_check_idxs

    monkeypatch.setattr(quick, "_direct", {f"quicktest.{name}": lambda: lambda x, *more: x for name in ("twice", "other")})
    seen: list[int] = []
    generated.current_callable.__self__.one = SimpleNamespace()
    monkeypatch.setattr(torch.ops.aten, "add", SimpleNamespace(Tensor=lambda x, one: (seen.append(x.data_ptr() % 16), x)[1]))
    plain = generated.current_callable
    generated.current_callable = align_inputs_from_check_idxs(plain, [0], set())
    for run in (quick.quick(SimpleNamespace(current_callable=plain)), quick.quick(generated)):
        run([torch.zeros(7)[1:].view(2, 3)])
    assert seen == [4, 0]


LAUNCHES = """
class Runner:
    def call(self, args):
        x, = args
        one.run(x, 3, stream=7)
        two.run(x, 4, stream=7)
        other.run(x, 5, stream=7)
"""


class CachingAutotuner:
    """As PyTorch's: how many starts it could choose from, and what its own way was called with."""

    def __init__(self, launchers: int, static: bool = True):
        self.called: list[tuple] = []
        self.launchers = [self._launcher(static) for _ in range(launchers)]

    def _launcher(self, static: bool):
        def launch(*args: object, stream: int) -> None:
            self.called.append(("directly", *args, stream))

        launch._is_static = static
        return launch

    def run(self, *args: object, stream: int) -> None:
        self.called.append(("by its own way", *args, stream))


@pytest.mark.parametrize("ranges", [False, True])
def test_kernels_are_started_by_what_was_chosen(tmp_path, ranges):
    file = tmp_path / "launches.py"
    file.write_text(LAUNCHES)
    names = {"one": CachingAutotuner(1), "two": CachingAutotuner(2), "other": CachingAutotuner(1, static=False)}
    exec(compile(LAUNCHES, str(file), "exec"), names)
    quick.quick(SimpleNamespace(current_callable=names["Runner"]().call), ranges)(["x"])
    how = "by its own way" if ranges else "directly"
    assert [names[name].called for name in ("one", "two", "other")] == [
        [(how, "x", 3, 7)], [("by its own way", "x", 4, 7)], [("by its own way", "x", 5, 7)]]
    names["one"]._cached_launcher = None  # PyTorch 2.13
    quick.quick(SimpleNamespace(current_callable=names["Runner"]().call))(["x"])
    assert names["one"].called[-1][0] == "by its own way"


def test_code_of_another_form_runs_as_it_is():
    def code(inputs: list[Tensor]) -> list[Tensor]:
        return inputs

    assert quick.quick(code) is code
    other = SimpleNamespace(current_callable=code)
    assert quick.quick(other) is other


def products() -> fx.GraphModule:
    made = fx.Graph()
    x, w = made.placeholder("x"), made.placeholder("w")
    y = made.call_function(torch.ops.aten.mm.default, (x, w))
    made.output((made.call_function(torch.ops.aten.mm.default, (y, w)),))
    return fx.GraphModule(nn.Module(), made)


class Seen(TorchDispatchMode):
    """Which operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators.append(str(function))
        return function(*args, **kwargs or {})


def test_code_is_quick_from_its_second_run_on(monkeypatch):
    """`compat.code_of`; what comes in is looked at in every run, and whoever looks at operators sees them."""
    x, w, codes = torch.randn(4, 4), torch.randn(4, 4), []
    with torch._inductor.utils.fresh_cache(), compat.faked([x, w]) as fakes:
        stages.graphs_before(products(), fakes, {}, then=lambda graphs: codes.append(compat.code_of(None)(
            stages.apply_graph_passes(graphs[0].module, {}, True), graphs[0].options, exact=1)[0]))
    (code,), finished, runs = codes, [], []
    monkeypatch.setattr(quick, "_finished", [finished.append])
    with torch.no_grad():
        for _ in range(3):
            given = [x, w]
            torch.testing.assert_close(code(given)[0], x @ w @ w)
            runs.append((given, len(finished)))
        assert runs == [([], 0), ([], 1), ([], 2)] and finished == [False, False]
        with pytest.raises(AssertionError, match="expected size"):
            code([x[:3], w])
        with pytest.raises(AssertionError, match="stride"):
            code([x.t(), w])
        with Seen() as seen, torch.device("cpu"):
            code([x, w])
        assert len([op for op in seen.operators if op.startswith("aten.mm")]) == 2 and len(finished) == 2
        code._quick[False] = lambda inputs: 1 / 0
        with pytest.raises(ZeroDivisionError):
            code([x, w])
        assert finished[-1] is True
        code.prepare_for_serialization()
        assert code._entrance is None and not code._quick


def test_below_autograd_nothing_is_recorded():
    """`compat.below_autograd`, `compat.when_finished`"""
    x = torch.ones(2, requires_grad=True)
    with compat.below_autograd():
        assert not (x * 2).requires_grad
    check = lambda failed: None  # noqa: E731
    compat.when_finished(check)
    assert quick._finished.pop() is check
