"""The inductor backend: it computes what eager computes, and its passes over compiled graphs keep programs valid."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxpar
from fxpar import compat
from fxpar.backends.inductor import buckets, casts, overlap
from fxpar.backends.inductor import lower as inductor
from fxpar.backends.transport.base import Transport
from fxpar.garbage import few_collections
from fxpar.ops import collectives
from fxpar.passes.capture import capture
from fxpar.sharding import deal
from tests.graphs import Made, local_feed, runtime_of, schedule
from tests.processes import launch

aten, c10d = torch.ops.aten, torch.ops._c10d_functional


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 32), nn.Linear(32, 8), nn.Dropout(dropout)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.down(self.drop(F.gelu(self.up(x)))), target)


def net(dropout: float = 0.0) -> tuple[Net, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Net(dropout), {"x": torch.randn(4, 8), "target": torch.randint(8, (4,))}


# ---- against eager ----


def two_steps(rank: int, plan: str, backend: str) -> tuple[list[float], dict[str, Tensor]]:
    model, batch = net(dropout=0.3)
    torch.manual_seed(3)
    dp = fxpar.Plan.parse(plan).dp
    mine = {k: v.chunk(dp)[rank % dp] for k, v in batch.items()}
    module = fxpar.parallelize(model, plan, mine, backend=backend)
    losses = []
    for _ in range(2):
        loss = module(**mine)
        loss.backward()
        losses.append(loss.item())
    return losses, {n: p.grad.full_tensor() for n, p in module.named_parameters()}


def same(have: tuple, want: tuple) -> None:
    assert have[0] == pytest.approx(want[0], rel=1e-6)
    for name, grad in want[1].items():
        torch.testing.assert_close(have[1][name], grad, rtol=1e-5, atol=1e-7)


@pytest.fixture
def thawed() -> Iterator[None]:
    """Nothing is kept from collections of garbage, as in a program that knows nothing of `gc`."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    yield
    if frozen:
        gc.freeze()


@pytest.mark.parametrize("often", [(700, 10, 10), (0, 10, 10), (50_000, 5, 500)])
def test_garbage_is_collected_as_before_compiling(often, monkeypatch, thawed):
    inside, before = [], gc.get_threshold()
    model, batch = net()

    def compile_graph(*args, **options):
        inside.append((gc.get_threshold(), gc.get_freeze_count() > 0))
        raise ZeroDivisionError

    monkeypatch.setattr(compat, "compile_graph", compile_graph)
    gc.set_threshold(*often)
    try:
        with pytest.raises(ZeroDivisionError):
            fxpar.parallelize(model, "dp=1", batch, backend="inductor")(**batch)
        assert gc.get_threshold() == often and gc.get_freeze_count() == 0
    finally:
        gc.set_threshold(*before)
    rarely = {700: (1_000_000, 50, 100), 0: often, 50_000: (1_000_000, 50, 500)}
    assert inside == [(rarely[often[0]], True)]


def test_garbage_of_compiling_is_collected_at_its_end(thawed):
    class Ring:
        def __init__(self) -> None:
            self.me = self

    with few_collections():
        with few_collections():
            left = weakref.ref(Ring())
        assert left() is not None
    assert left() is None


def test_what_a_program_has_kept_from_collections_stays_so(thawed):
    gc.freeze()
    frozen = gc.get_freeze_count()
    with few_collections(), few_collections():
        assert gc.get_freeze_count() == frozen
    assert gc.get_freeze_count() == frozen


def test_one_process_equals_eager_and_a_second_module_finds_what_the_first_compiled():
    want = two_steps(0, "dp=1", "eager")
    same(two_steps(0, "dp=1", "inductor"), want)
    before = compat.cache_counts()
    same(two_steps(0, "dp=1", "inductor"), want)
    after = compat.cache_counts()
    assert {word: after[word] - before[word] for word in after if after[word] != before[word]} == {"hit": 1, "graph hit": 2}


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("plan", ["dp=2", "tp=2"])
def test_two_processes_equal_eager(plan):
    want = two_steps(0, "dp=1", "eager")
    for have in launch(2, two_steps, plan, "inductor", timeout=300):
        same(have, want)


# ---- what is compiled ----


@pytest.mark.parametrize("plan, forward, backward", [
    # The loss and the number of rows; the gradients of four parameters, started together.
    ("dp=2", {"all_reduce": 2, "wait_tensor": 2}, {"all_reduce_coalesced": 1, "wait_tensor": 4}),
    # `down` is split along ffn and its result along classes, over which the loss is a maximum and two sums.
    ("tp=2", {"reduce_scatter_tensor": 1, "all_reduce": 3, "wait_tensor": 4},
     {"all_gather_into_tensor": 2, "wait_tensor": 2}),
    # Both weights and both biases, together; and again the one weight that the backward needs.
    ("dp=2,zero=3", {"all_gather_into_tensor_coalesced": 1, "all_reduce": 2, "wait_tensor": 6},
     {"all_gather_into_tensor": 1, "reduce_scatter_tensor_coalesced": 1, "wait_tensor": 5}),
])  # fmt: skip
def test_compiled_graphs_communicate(two_ranks, monkeypatch, plan, forward, backward):
    graphs: list[Counter[str]] = []
    last = buckets.bucket_reductions

    def seen(graph: fx.Graph, **options: Any) -> None:
        last(graph, **options)
        graphs.append(Counter(n.target.overloadpacket.__name__ for n in graph.nodes
                              if getattr(n.target, "namespace", "") == "_c10d_functional"))

    monkeypatch.setattr(buckets, "bucket_reductions", seen)
    model, batch = net()
    program = fxpar.compile_program(model, plan, batch)
    runtime, feed = runtime_of(program), local_feed(program, model, batch)
    monkeypatch.setattr(inductor, "key_of", lambda *args: None)  # a cached graph would not be scheduled again
    (loss,) = inductor.lower(program.module, feed, runtime, program.plan)(*feed)
    loss.backward()
    assert graphs == [forward, backward]


def key(plan: str = "dp=2,zero=3", *args: Any, **options: Any) -> tuple[bytes, bytes]:
    """By what Inductor finds what it compiled before, as far as it follows from our graph passes: joint, and halves."""
    settings = inductor.settings(fxpar.Plan.parse(plan), *args, **options)
    return settings["joint_custom_pre_pass"].uuid(), settings["post_grad_custom_post_pass"].uuid()


def test_what_was_compiled_is_found_by_its_passes_and_their_options():
    copies, others = Transport({"dp": "copies"}), Transport({"dp": "others"})
    assert key() == key("zero=3,dp=2") and key("dp=2,zero=3", copies) == key("dp=2,zero=3", Transport({"dp": "copies"}))
    halves = [key()[1], key("dp=2,zero=3", copies)[1], key("dp=2,zero=3", others)[1], key(as_on_gpu=True)[1], key(passes=3)[1],
              key("dp=2,zero=3,overlap_grad_reduce=false")[1], key("dp=2,zero=3,overlap_param_gather=false")[1]]
    assert len(set(halves)) == len(halves)
    assert key()[0] == key("dp=2,zero=3", copies)[0] != key("dp=2,zero=3,recompute=full")[0]
    assert not set(key()) & set(key(key="that of a graph"))


KERNEL = Path(collectives.__file__).parent / "kernels" / "flash.py"


@pytest.mark.parametrize("source", [compat.__file__, casts.__file__, overlap.__file__, collectives.__file__, deal.__file__,
                                    capture.__file__, str(KERNEL)], ids=lambda source: Path(source).stem)
def test_what_was_compiled_is_not_found_once_a_source_has_changed(source, tmp_path, monkeypatch):
    files, before = inductor._sources(), key()
    assert source in files
    changed = tmp_path / "changed.py"
    changed.write_text(Path(source).read_text() + "# changed")
    monkeypatch.setattr(inductor, "_sources", lambda: [str(changed) if f == source else f for f in files])
    assert not set(key()) & set(before)


# ---- the passes over compiled graphs, on one made by hand ----


def waiting(group: str) -> Made:
    """Two reductions waited for at once, one of them used through a view, beside two products."""
    made = Made()
    a, b = made.input("a"), made.input("b")
    first = made.reduced("first", a, group)
    seen = made.call("seen", aten.view.default, first, [16])
    second = made.reduced("second", b, group)
    product = made.call("product", aten.mm.default, b, b)
    again = made.call("again", aten.mm.default, product, b)
    uses = made.call("uses", aten.add.Tensor, seen, made.call("flat", aten.view.default, again, [16]))
    made.graph.output((uses, second))
    return made


def test_waits_come_right_before_what_computes_with_them(one_thread):
    made = waiting(one_thread)
    before = made.run()
    overlap.overlap_communication(made.graph)
    names = made.names()
    assert names[:4] == ["start_first", "start_second", "product", "again"]
    assert names.index("wait_first") < names.index("seen") < names.index("uses")
    assert names.index("wait_first") > names.index("again")
    assert names[-1] == "wait_second"  # only returned
    assert sorted(names) == sorted(waiting(one_thread).names())
    assert all(map(torch.equal, made.run(), before))


def gradients(group: str, dtypes: list[torch.dtype]) -> Made:
    """Gradients that are reduced and returned, one of them cast on the way, and a reduction that is computed with."""
    made = Made()
    inputs = [made.input(f"x{i}", dtype) for i, dtype in enumerate(dtypes)]
    used = made.reduced("used", inputs[0], group)
    waits = [made.reduced(f"g{i}", x, group) for i, x in enumerate(inputs)]
    waits[0] = made.call("cast", aten.to.dtype, waits[0], torch.float64)
    made.graph.output((made.call("uses", aten.mm.default, used, inputs[2]), *waits))
    return made


def joined(made: Made) -> list[list[str]]:
    return [[a.name for a in n.args[0]] for n in made.graph.nodes if n.target is c10d.all_reduce_coalesced.default]


def test_reductions_that_leave_the_graph_start_together(one_thread):
    made = gradients(one_thread, [torch.float32] * 3)
    before = made.run()
    buckets.bucket_reductions(made.graph)
    assert joined(made) == [["x0", "x1", "x2"]]
    assert "start_used" in made.names()  # what is computed with keeps its own
    assert all(map(torch.equal, made.run(), before))


def test_buckets_are_of_bounded_size_and_one_dtype(one_thread):
    made = gradients(one_thread, [torch.float32] * 5)
    buckets.bucket_reductions(made.graph, limit=2 * 64)
    assert joined(made) == [["x0", "x1"], ["x2", "x3"]]  # one alone is left as it is
    mixed = gradients(one_thread, [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16])
    before = mixed.run()
    buckets.bucket_reductions(mixed.graph)
    assert sorted(joined(mixed)) == [["x0", "x2"], ["x1", "x3"]]
    assert all(map(torch.equal, mixed.run(), before))


def test_both_passes_together_keep_values(one_thread):
    made = gradients(one_thread, [torch.float32] * 3)
    before = made.run()
    schedule(made.graph, fxpar.Plan())
    assert len(joined(made)) == 1 and all(map(torch.equal, made.run(), before))
