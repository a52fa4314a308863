"""Every private torch API that fxpar touches, entry by entry: a torch release that breaks one fails here first."""

from __future__ import annotations

import gc
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.nn.functional as F
from torch import fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.overrides import TorchFunctionMode
from torch.utils import flop_counter

from fxpar import compat
from fxpar.backends.transport.copies import CopyGroup
from tests.slots import Alone

aten = torch.ops.aten


def one_rank_mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh("cpu", (1,))


def regions() -> fx.Graph:
    """A graph with a no-grad region and an autocast region, as export makes them."""

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                scale = x.abs().max() + 1
            with torch.autocast("cpu", torch.bfloat16):
                y = x @ x
            return y / scale

    return torch.export.export(Net(), (torch.ones(2, 2),)).graph


def test_everything_is_tested():
    public = {n for n, f in vars(compat).items() if getattr(f, "__module__", "") == compat.__name__ and n[0] != "_"}
    text = open(__file__).read()
    assert [n for n in sorted(public | set(compat.__all__)) if f"compat.{n}" not in text] == []


def test_the_store_of_the_processes_has_a_second_connection():
    one_rank_mesh()
    store = compat.default_store()
    store.set("fxpar/test", "x")
    assert compat.default_store().get("fxpar/test") == b"x" and not store.check(["fxpar/none"])


def test_fake_mode_computes_shapes_and_is_found_again():
    with compat.FakeTensorMode() as mode:
        x = torch.empty(1 << 40, dtype=torch.bfloat16)
        assert isinstance(x, compat.FakeTensor) and (x + x).shape == (1 << 40,)
    assert compat.detect_fake_mode([x]) is mode and compat.detect_fake_mode([torch.ones(1)]) is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fake_like(device):
    t = torch.empty(3, 2, device=device).t()
    fake = compat.fake_like(compat.FakeTensorMode(), t, torch.device("cpu"))
    assert isinstance(fake, compat.FakeTensor) and fake.device.type == "cpu"
    assert (fake.shape, fake.stride(), fake.dtype) == (t.shape, t.stride(), t.dtype)
    other = compat.fake_like(compat.FakeTensorMode(), t, torch.device("cpu"), torch.int8, (5, 4))
    assert (tuple(other.shape), other.dtype) == ((5, 4), torch.int8)


def test_is_pointwise():
    assert compat.is_pointwise(aten.add.Tensor) and compat.is_pointwise(aten.gelu.default)
    assert not any(map(compat.is_pointwise, (aten.sum.default, aten.mm.default, torch.add, len)))


def test_is_random():
    assert all(map(compat.is_random, (aten.rand.default, aten.normal_.default, aten.bernoulli.default, aten.dropout.default)))
    assert not any(map(compat.is_random, (aten.add.Tensor, torch.rand)))


def test_is_grouped_product():
    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(compat.is_grouped_product(func))
            return func(*args, **(kwargs or {}))

    seen: list[bool] = []
    x, weights, ends = torch.ones(4, 8), torch.ones(2, 8, 8), torch.tensor([2, 4], dtype=torch.int32)
    with Seen():
        F.grouped_mm(x, weights, offs=ends)
        aten._grouped_mm(x, weights, ends)
        aten._grouped_mm.default(x, weights, ends)
        torch.mm(x, x.T)
    assert seen[:3] == [True, True, True] and not any(seen[3:])


def test_mutates():
    assert all(map(compat.mutates, (aten.add_.Tensor, aten.copy_.default)))
    assert not any(map(compat.mutates, (aten.add.Tensor, aten.view.default, torch.add)))


@pytest.mark.parametrize("found", [compat.no_grad_region, compat.autocast_region])
def test_regions_are_recognised(found):
    assert [found(n) for n in regions().nodes].count(True) == 1


def test_compile_graph_has_autograd():
    graph = fx.symbolic_trace(lambda x, w: (torch.tanh(x @ w),))
    x, w = torch.randn(3, 4), torch.randn(4, 2, requires_grad=True)
    (y,) = compat.compile_graph(graph, [x, w], {"reorder_for_peak_memory": False})(x, w)
    torch.testing.assert_close(y, torch.tanh(x @ w))
    (mine,), (theirs,) = torch.autograd.grad(y.sum(), w), torch.autograd.grad(torch.tanh(x @ w).sum(), w)
    torch.testing.assert_close(mine, theirs)


def test_graph_pass_sees_the_graph_and_is_identified_by_its_files():
    seen = []
    made = compat.graph_pass(seen.append, __file__)
    graph = fx.Graph()
    made(graph)
    assert seen == [graph]
    assert made.uuid() == compat.graph_pass(len, __file__).uuid() != compat.graph_pass(len, compat.__file__).uuid()
    keyed = [compat.graph_pass(len, __file__, key=key).uuid() for key in ("", "a", "b", "a")]
    assert keyed[0] == made.uuid() and keyed[1] == keyed[3] and len(set(keyed)) == 3


def test_joint_graphs_are_edited_and_then_split():
    graph = fx.symbolic_trace(lambda x, w: ((x @ w).exp().sin(),))
    x, w = torch.randn(3, 4), torch.randn(4, 2, requires_grad=True)
    seen: dict[str, list] = {}

    def joint(graph: fx.Graph) -> None:
        calls = [n for n in graph.nodes if n.op == "call_function"]
        seen["forward"] = [n.target for n in calls if not compat.in_backward(n)]
        seen["backward"] = [n.target for n in calls if compat.in_backward(n)]

    (y,) = compat.partition_eagerly(graph, [x, w], joint)(x, w)
    (mine,), (theirs,) = torch.autograd.grad(y.sum(), w), torch.autograd.grad((x @ w).exp().sin().sum(), w)
    torch.testing.assert_close(mine, theirs)
    assert {aten.exp.default, aten.sin.default} <= set(seen["forward"]) - {aten.cos.default}
    assert aten.cos.default in seen["backward"] and aten.sin.default not in seen["backward"]


def test_memory_budget_keeps_less():
    def kept(budget: float | None) -> int:
        def function(x: torch.Tensor) -> tuple[torch.Tensor]:
            for _ in range(6):
                x = torch.tanh(x @ x)
            return (x,)

        x, sizes = torch.randn(16, 16, requires_grad=True), []
        with compat.memory_budget(budget):
            run = compat.partition_eagerly(fx.symbolic_trace(function), [x], lambda graph: None)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            run(x)
        return sum(sizes)

    assert kept(None) == kept(1.0) > kept(0.3)
    assert kept(None) == kept(1.0)  # nothing stays set


def test_operators_of_attention_with_fewer_heads_of_keys_are_counted_under_a_memory_budget():
    q, k = torch.empty(2, 8, 16, 64, device="meta"), torch.empty(2, 2, 16, 64, device="meta")
    with compat.memory_budget(0.5):
        grouped = flop_counter.sdpa_flop_count(q.shape, k.shape, k.shape)
        assert grouped == flop_counter.sdpa_flop_count(q.shape, q.shape, q.shape) > 0


def test_trunc_normal_as_replaces_it_and_puts_it_back():
    calls = []

    def function(original, tensor, *args, **kwargs):
        calls.append((tensor.is_meta, *args[:2]))
        return tensor if tensor.is_meta else original(tensor, *args, **kwargs)

    real = torch.zeros(100)
    with compat.trunc_normal_as(function):
        nn.init.trunc_normal_(torch.empty(3, device="meta"), mean=1.0)
        nn.init.trunc_normal_(real, std=0.5)
    assert calls == [(True, 1.0, 1.0), (False, 0.0, 0.5)] and 0 < real.abs().max() <= 2
    nn.init.trunc_normal_(real)
    assert len(calls) == 2


def test_strided_shard_splits_what_lies_behind_other_factors():
    placement = compat.strided_shard(0, 3)
    parts, _ = placement._split_tensor(torch.arange(12), 2)
    assert [p.tolist() for p in parts] == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]


def test_strided_shards_that_say_no_order_are_gathered_whatever_made_them():
    p = DTensor.from_local(torch.arange(6.0), one_rank_mesh(), [compat.strided_shard(0, 3)])
    for t in (p, p.detach(), torch.ones_like(p), p.redistribute(placements=[Replicate()]).redistribute(placements=p.placements)):
        assert t.placements == p.placements and torch.equal(t.full_tensor(), t.to_local())


def test_checkpoints_of_torch_refuse_parts_of_several_pieces(tmp_path):
    mesh, inside = one_rank_mesh(), [compat.strided_shard(0, 3)]
    whole = DTensor.from_local(torch.ones(12), mesh, inside)
    part = DTensor.from_local(torch.ones(6), mesh, inside, shape=torch.Size([12]), stride=(1,))
    dist.checkpoint.save({"p": whole}, checkpoint_id=tmp_path / "c")
    dist.checkpoint.load({"p": whole}, checkpoint_id=tmp_path / "c")
    for run in (dist.checkpoint.save, dist.checkpoint.load):
        with pytest.raises(dist.checkpoint.api.CheckpointException, match=r"several pieces; use fxpar.save_checkpoint"):
            run({"p": part}, checkpoint_id=tmp_path / "c")


def test_memory_and_want_gradients():
    mesh = one_rank_mesh()
    p = nn.Parameter(DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)]))
    assert compat.memory(p) is compat.memory(p) and compat.memory(p).data_ptr() == p.to_local().data_ptr()
    frozen = DTensor.from_local(torch.ones(1), mesh, [Replicate()])
    assert compat.want_gradients([p, frozen, torch.ones(1, requires_grad=True)]) == [True, False, True]


def test_dtypes():
    p = nn.Parameter(DTensor.from_local(torch.ones(2, dtype=torch.float16), one_rank_mesh(), [Shard(0)]))
    assert compat.dtypes([p, torch.ones(1)]) == [torch.float16, torch.float32]


@pytest.mark.parametrize("register", ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"])
def test_hooks(register):
    module = nn.Linear(1, 1)
    tables = compat.hooks(module)
    assert not any(tables)
    handle = getattr(module, f"register_{register}")(print)
    assert sum(map(len, tables)) == 1 and [v for t in tables for v in t.values()] == [print]
    handle.remove()
    assert not any(tables)


def test_local_part_and_like_dtensor():
    p = DTensor.from_local(torch.arange(6.0).view(2, 3), one_rank_mesh(), [Shard(0)]).requires_grad_()
    local = compat.local_part(p)
    assert local.data_ptr() == p.to_local().data_ptr() and not local.requires_grad
    made = compat.like_dtensor(local * 2, p)
    assert isinstance(made, DTensor) and made.placements == p.placements and made.device_mesh == p.device_mesh
    assert torch.equal(made.to_local(), local * 2) and made.shape == p.shape and not made.requires_grad
    assert DTensor.from_local(local, p.device_mesh, [Replicate()]).placements != made.placements
    turned = compat.like_dtensor(local.t().contiguous().t(), p)
    assert turned.to_local().stride() == p.to_local().stride() and torch.equal(turned.to_local(), local)


def test_version_grows_with_every_write_and_what_is_queued_runs_after_backward():
    p = DTensor.from_local(torch.ones(2), one_rank_mesh(), [Shard(0)])
    before = compat.version(p)
    with torch.no_grad():
        p.to_local().mul_(2)
    assert compat.version(p) > before
    order: list[str] = []
    x, y = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    x.register_hook(lambda g: order.append("first") or compat.after_backward(lambda: order.append("after")))
    y.register_hook(lambda g: order.append("second"))
    (x.sin() * 2 + y.sin().cos().exp()).backward()
    assert sorted(order[:2]) == ["first", "second"] and order[2:] == ["after"]


def test_lowered_graphs_are_those_of_forward_and_backward():
    graph = fx.symbolic_trace(lambda x, w: (torch.tanh(x @ w),))
    with compat.FakeTensorMode():
        x, w = torch.empty(3, 4), torch.empty(4, 2, requires_grad=True)
    seen = []
    config = {"post_grad_custom_post_pass": compat.graph_pass(seen.append, __file__)}
    forward, backward = compat.lowered_graphs(graph, [x, w], config)
    assert [g.graph for g in (forward, backward)] == seen
    assert [n.target for n in forward.graph.nodes if n.op == "call_function"][:2] == [aten.mm.default, aten.tanh.default]
    assert [n.name for n in backward.graph.nodes if n.op == "placeholder"][-1] == "tangents_1"
    with torch.no_grad():
        assert len(compat.lowered_graphs(graph, [x, w], {})) == 1


def test_interpreted_graphs_compute_what_compiled_ones_do():
    """`compat.interpret_graph`, through the graph passes of its settings, forward and backward."""
    ran = []

    class Counting(fx.Interpreter):
        def call_function(self, target, args, kwargs):
            ran.append(target)
            return super().call_function(target, args, kwargs)

    graph = fx.symbolic_trace(lambda x, w: (torch.tanh(x @ w),))
    x, w = torch.randn(3, 4), torch.randn(4, 2, requires_grad=True)
    passed: list[fx.Graph] = []
    config = {"post_grad_custom_post_pass": compat.graph_pass(passed.append, __file__)}
    run = compat.interpret_graph(graph, [x, w], config, Counting)
    assert len(passed) == 2 and ran == []  # the backward too, before anything ran
    (y,) = run(x, w)
    assert ran[:2] == [aten.mm.default, aten.tanh.default]
    torch.testing.assert_close(y, torch.tanh(x @ w))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), w)[0], torch.autograd.grad(torch.tanh(x @ w).sum(), w)[0])


@pytest.mark.parametrize("way", ["trace", "interpret", "compile"])
def test_steps_are_handed_over_ready_to_run(way):
    """`compat.trace_steps`, `compat.interpret_steps`, `compat.compile_steps`: a `compat.Traced`, what a `compat.Cut` made."""
    x, w = torch.randn(3, 4).requires_grad_(), torch.randn(4, 2).requires_grad_()
    ready: list = []

    def cut(graph: fx.GraphModule, like: list, saved: int, donated: list[int], make: compat.Make) -> None:
        assert len(like) == saved + 1 and (way == "trace" or donated)
        ready.append(make(graph, like, donated, 2))

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("own", torch.ones(2))

        def forward(self, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
            return (x @ w + self.own,)

    def steps(function) -> compat.Traced:
        graph, config = fx.symbolic_trace(function), {"reorder_for_peak_memory": False}
        kept: compat.Cut = cut
        return {"trace": lambda: compat.trace_steps(graph, [x, w], lambda joint: None, kept),
                "interpret": lambda: compat.interpret_steps(graph, [x, w], config, fx.Interpreter, kept),
                "compile": lambda: compat.compile_steps(graph, [x, w], config, kept)}[way]()

    made = steps(lambda x, w: (torch.sin(x @ w), x.detach() + 1))
    with torch.autocast("cpu", torch.bfloat16), compat.as_traced():
        y, z, *saved = made.run([x, w])
        ((run, like),) = ready
        grads = run([*saved, torch.ones(3, 2)])
    assert made.seeds == [0] and made.saved == len(saved) and not y.requires_grad and y.dtype == torch.float32
    torch.testing.assert_close([y, z, *grads], [
        torch.sin(x @ w).detach(), x.detach() + 1, *torch.autograd.grad(torch.sin(x @ w).sum(), [x, w])])
    assert [(a.shape, a.stride()) for a in like] == [(a.shape, a.stride()) for a in grads]
    with pytest.raises(compat.SharedOutputs) as shared:
        steps(lambda x, w: (x @ w, x.t()))
    assert shared.value.positions == [1]
    with pytest.raises(compat.NotInSteps):
        steps(Own())
    assert compat.storage_of(x) == compat.storage_of(x.t()[1:]) != compat.storage_of(x.clone())


def test_operands_are_computed_where_they_are_concatenated():
    """`compat.lower_as_concatenation`."""
    from fxpar.backends.inductor.products import WRITTEN

    compat.lower_as_concatenation(WRITTEN)
    x = torch.randn(4, 3)
    run = torch.compile(lambda x: WRITTEN([x.sin(), x.cos()], 1), fullgraph=True)
    with torch.no_grad():
        have, (code,) = torch._inductor.utils.run_and_get_code(run, x)
    torch.testing.assert_close(have, torch.cat([x.sin(), x.cos()], 1))
    assert "fxpar.cat.default(" not in code.split("def call")[-1] and code.count("# alias") == 2


def test_a_registered_group_is_found_by_its_name():
    group = CopyGroup(Alone())
    compat.register_group(group, "alone")
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(torch.arange(3), 1, "alone")
    assert torch.ops._c10d_functional.wait_tensor(gathered).tolist() == [0, 1, 2]
    compat.unregister_group("alone")
    with pytest.raises(RuntimeError, match="alone"):
        torch.ops._c10d_functional.all_gather_into_tensor(torch.arange(3), 1, "alone")


class Noted(dist.Work):
    """Work that notes in a list that it was waited for."""

    def __init__(self, notes: list[str]):
        super().__init__()
        self.notes = notes

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self.notes.append("waited")
        return True


def test_registered_work_is_waited_for():
    notes: list[str] = []
    x = torch.ones(2)
    compat.register_work(x, Noted(notes))
    gc.collect()
    assert notes == [] and torch.ops._c10d_functional.wait_tensor(x) is x and notes == ["waited"]


def test_a_group_is_resolved_by_its_name():
    group = CopyGroup(Alone())
    compat.register_group(group, "resolved")
    assert compat.collective_group("resolved") is group


@pytest.mark.gpu
def test_symmetric_slots_are_seen_by_all_ranks():
    """`compat.SymmetricSlots`: see slots_program.py."""
    program = Path(__file__).with_name("slots_program.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "equal" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]


def test_reentrant_checkpoints_are_calls_while_inlined():
    from torch.utils.checkpoint import checkpoint

    x = torch.ones(2, requires_grad=True)

    def made() -> str:
        return type(checkpoint(torch.sin, x, use_reentrant=True).grad_fn).__name__

    with compat.checkpoints_inlined():
        assert made() == "SinBackward0"
    assert made() == "CheckpointFunctionBackward"


def test_the_fate_of_a_node_in_a_backward_pass():
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    inner = x * y
    leaves = [torch.autograd.graph.get_gradient_edge(t).node for t in (x, y)]
    outer, seen = inner * 2, []

    def look(_: torch.Tensor) -> None:
        seen.append([compat.backward_pass(), *map(compat.fate, [*leaves, inner.grad_fn])])

    outer.register_hook(look)
    outer.sum().backward(retain_graph=True)
    outer.sum().backward(retain_graph=True, inputs=[x])
    torch.autograd.grad(outer.sum(), x, retain_graph=True)
    torch.autograd.grad(outer.sum(), inner)
    assert [s[1:] for s in seen] == [["accumulated", "accumulated", "passed"], ["accumulated", "left out", "passed"],
                                     ["asked for", "left out", "passed"], ["left out", "left out", "passed"]]
    assert len({s[0] for s in seen}) == 4 and compat.backward_pass() == -1


def test_hooks_move_with_their_handles_and_are_attached_again():
    old, new = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    handles = [old.register_hook(lambda g: g * 2), old.register_post_accumulate_grad_hook(lambda p: seen.append(p is new))]
    seen: list[bool] = []
    assert compat.are_hooked([new, old]) and not compat.are_hooked([new])
    compat.move_hooks(old, new, lambda hook: lambda g: hook(g) + 1, lambda hook: hook)
    assert compat.are_hooked([new]) and not compat.are_hooked([old])
    new.sum().backward()
    assert new.grad.tolist() == [3, 3] and seen == [True]
    torch.utils.swap_tensors(new, nn.Parameter(torch.ones(2)))
    new.sum().backward()
    compat.attach_hooks([new, old])
    new.sum().backward()
    assert new.grad.tolist() == [4, 4] and seen == [True, True]
    for handle in handles:
        handle.remove()
    new.sum().backward()
    assert new.grad.tolist() == [5, 5] and len(seen) == 2 and not compat.are_hooked([new])


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x * 1

    @staticmethod
    def backward(ctx, g: torch.Tensor) -> torch.Tensor:
        return g * 3


class WithSetup(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * 1

    @staticmethod
    def setup_context(ctx, inputs, output) -> None: ...


def test_functions_applied_by():
    x = torch.ones(2, requires_grad=True)
    with compat.functions_applied_by(lambda cls, *args: (cls, args)):
        assert Tripled.apply(x) == (Tripled, (x,))
    Tripled.apply(x).sum().backward()
    assert x.grad.tolist() == [3, 3]


def test_has_setup_context():
    assert compat.has_setup_context(WithSetup) and not compat.has_setup_context(Tripled)


def test_trace():
    def gradient(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad((x * x).sum(), x)[0]

    with compat.FakeTensorMode() as mode:
        x = torch.ones(3)
    made = compat.trace(gradient, [x])
    assert any(n.target is aten.mul.Tensor for n in made.graph.nodes)
    assert all(n.meta["val"].fake_mode is mode for n in made.graph.nodes if n.op == "call_function")
    assert made(torch.tensor([1.0, 2, 3])).tolist() == [2, 4, 6]


def test_forward_hooks_of_one_module_and_of_all():
    linear = nn.Linear(2, 2)
    linear.register_forward_hook(lambda module, args, out: out * 0)
    linear.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)
    assert sum(len(getattr(linear, name)) for name in compat.HOOKS) == 3
    x = torch.ones(1, 2)
    with compat.without_forward_hooks(linear):
        assert linear(x).abs().sum() > 0
    assert linear(x).abs().sum() == 0
    assert not compat.has_global_hooks()
    for register in (nn.modules.module.register_module_forward_hook, nn.modules.module.register_module_forward_pre_hook,
                     nn.modules.module.register_module_full_backward_hook,
                     nn.modules.module.register_module_full_backward_pre_hook):
        handle = register(lambda *_: None)
        assert compat.has_global_hooks()
        handle.remove()
