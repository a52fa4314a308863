"""Every private torch API that fxpar touches, entry by entry: a torch release that breaks one fails here first."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.overrides import TorchFunctionMode

from fxpar import compat
from fxpar.backends.transport.copies import CopyGroup
from tests.slots import Alone

aten = torch.ops.aten


def one_rank_mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh("cpu", (1,))



def test_everything_is_tested():
    public = {n for n, f in vars(compat).items() if getattr(f, "__module__", "") == compat.__name__ and n[0] != "_"}
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_compat*.py"))
    assert [n for n in sorted(public | set(compat.__all__)) if f"compat.{n}" not in text] == []



def test_the_store_of_the_processes_has_a_second_connection():
    one_rank_mesh()
    store = compat.default_store()
    store.set("fxpar/test", "x")
    assert compat.default_store().get("fxpar/test") == b"x" and not store.check(["fxpar/none"])



def test_process_groups_are_found_whoever_made_them():
    one_rank_mesh()
    made = dist.new_group([0])
    assert made in compat.process_groups() and dist.group.WORLD in compat.process_groups()


def test_ends_of_process_groups_are_told_before_they_come(monkeypatch):
    for name in ("shutdown", "abort"):
        monkeypatch.setattr(dist.ProcessGroup, name, getattr(dist.ProcessGroup, name))  # as it was, afterwards
    seen = []
    compat.before_groups_end(seen.append)
    one_rank_mesh()
    made = dist.new_group([0])
    dist.destroy_process_group(made)
    assert seen == [made]
    dist.destroy_process_group()
    assert seen[1:] and made not in seen[1:]


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



def test_numbers_of_dtensors_are_read_from_what_is_made_of_them(monkeypatch):
    monkeypatch.setattr(DTensor, "__format__", DTensor.__format__)
    handlers = DTensor._op_dispatcher._custom_op_handlers
    before = handlers.get(aten._local_scalar_dense.default)
    t = DTensor.from_local(torch.tensor(2.0), one_rank_mesh(), [Replicate()])
    assert t.item() == 2
    compat.read_numbers_of(lambda t: t._local_tensor + 1)
    try:
        assert t.item() == float(t) == int(t) == 3 and bool(t - 2) and f"{t:.2f}" == "3.00" and "2.0" in f"{t}"
        with pytest.raises(TypeError, match="format"):
            f"{t.reshape(1):.2f}"
    finally:
        compat.read_numbers_of(lambda t: t._local_tensor)
        if before is not None:
            handlers[aten._local_scalar_dense.default] = before
    assert t.item() == 2


def test_sums_of_norms_are_of_whole_norms():
    mesh, norm = one_rank_mesh(), torch.ones(4, 6).norm
    norms = DTensor.from_local(torch.ones(4, 6), mesh, [Shard(0)]).norm(dim=0)
    placement = norms.placements[0]
    compat.mend_sums_of_norms()
    assert placement.is_partial() and placement.reduce_op == "sum" and norms.sum().placements == (Replicate(),)
    assert norms.sum(0, keepdim=True).placements == (Replicate(),) and norms.sum().item() == norm(dim=0).sum()
    assert torch.equal(compat.in_full(norms), norm(dim=0))
    assert DTensor.from_local(torch.ones(3), mesh, [Partial()]).sum().placements == (Partial(),)


def test_numbers_of_dtensors_are_added_to_plain_tensors():
    part, total = DTensor.from_local(torch.tensor(2.0), one_rank_mesh(), [Partial()]), torch.tensor(1.0)
    compat.mend_writes_to_plain_tensors()
    total += part
    assert type(total) is torch.Tensor and total.item() == 3 and total.copy_(part).item() == 2 and total.mul_(part).item() == 4
    assert part.mul_(2) is part and part.full_tensor().item() == 4


def test_what_is_put_into_data_is_told(monkeypatch):
    p, told = DTensor.from_local(torch.ones(2), one_rank_mesh(), [Replicate()]), []
    monkeypatch.setattr(DTensor, "data", torch.Tensor.data)
    p.data = p * 2
    assert torch.equal(p.to_local(), torch.ones(2))  # nothing was written
    compat.assign_data_by(lambda t, value: told.append((t, value)))
    p.data = 3
    assert told == [(p, 3)] and isinstance(p.data, DTensor) and not p.requires_grad_().data.requires_grad


def test_memory_of_dtensors_is_shared_by_who_is_told(monkeypatch):
    monkeypatch.setattr(DTensor, "share_memory_", None)
    told = []
    compat.share_memory_by(lambda t: told.append(t) or t)
    p = nn.Parameter(DTensor.from_local(torch.ones(4), one_rank_mesh()))
    nn.ParameterList([p]).share_memory()
    assert len(told) == 1 and told[0] is p


def test_nan_is_looked_for_in_parts_of_dtensors():
    compat.mend_searches_for_nan()
    t = DTensor.from_local(torch.tensor([1.0, float("nan")]), one_rank_mesh())
    assert torch.ops.aten._is_any_true(t.isnan()).item() and not torch.ops.aten._is_all_true(t.isnan()).item()


def test_norms_of_gradients_are_announced(monkeypatch):
    clip, told = torch.nn.utils.clip_grad, []
    for owner, name in ((clip, "_get_total_norm"), (torch.nn.utils, "get_total_norm")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    compat.before_norms.__wrapped__(told.append)
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    assert nn.utils.clip_grad_norm_(iter([p]), 1.0) == 2 and nn.utils.get_total_norm(p.grad / p.grad) == 2
    assert [len(gradients) for gradients in told] == [1, 1]


def test_checkpoints_of_torch_refuse_parts_of_several_pieces(tmp_path):
    mesh, inside = one_rank_mesh(), [compat.strided_shard(0, 3)]
    tensor = DTensor.from_local(torch.ones(12), mesh, inside)
    part = DTensor.from_local(torch.ones(6), mesh, inside, shape=torch.Size([12]), stride=(1,))
    dist.checkpoint.save({"p": tensor}, checkpoint_id=tmp_path / "c")
    dist.checkpoint.load({"p": tensor}, checkpoint_id=tmp_path / "c")
    for run in (dist.checkpoint.save, dist.checkpoint.load):
        with pytest.raises(dist.checkpoint.api.CheckpointException, match=r"several pieces; use fxpar.save_checkpoint"):
            run({"p": part}, checkpoint_id=tmp_path / "c")



def test_memory_want_gradients_and_gradients():
    mesh = one_rank_mesh()
    p = nn.Parameter(DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)]))
    assert compat.memory(p) is compat.memory(p) and compat.memory(p).data_ptr() == p.to_local().data_ptr()
    frozen = DTensor.from_local(torch.ones(1), mesh, [Replicate()])
    assert compat.want_gradients([p, frozen, torch.ones(1, requires_grad=True)]) == [True, False, True]
    p.grad = torch.zeros_like(p)
    assert compat.gradients([p, frozen]) == [p.grad, None]



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



def test_calls_of_a_module_go_through_a_function_of_which_copies_know_nothing():
    made, x = nn.Linear(2, 2), torch.ones(2)
    made.register_forward_hook(lambda module, args, out: out + 1)
    want = made(x)
    compat.call_by(made, functools.partial(lambda module, *args: ("called", compat.call_plainly(module, *args)), made))
    assert made(x)[0] == "called" and torch.equal(made(x)[1], want)
    assert torch.equal(copy.deepcopy(made)(x), want)
    assert compat.CALLED in vars(made)
    compat.call_by(made, None)
    assert torch.equal(made(x), want) and compat.CALLED not in vars(made)
    compiled = nn.Linear(2, 2)
    compiled._compiled_call_impl = compiled.forward  # as `compiled.compile()` has it
    compat.call_by(compiled, functools.partial(print))
    assert compiled(x).shape == (2,)


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


def test_metadata_of_a_checkpoint_is_read_without_its_code(tmp_path):
    """As torch reads it, and nothing that the file names but the records it consists of."""
    class Payload:
        def __reduce__(self):
            return Path.mkdir, (tmp_path / "ran",)

    one_rank_mesh()
    state = {"a": torch.ones(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": "text"}
    torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path / "c")
    file = tmp_path / "c" / ".metadata"
    want = torch.distributed.checkpoint.FileSystemReader(tmp_path / "c").read_metadata()
    have = compat.read_metadata(file.read_bytes())
    assert (have.state_dict_metadata, have.storage_data) == (want.state_dict_metadata, want.storage_data)
    for thing in (Payload(), torch.nn.Linear, torch.serialization.load):
        with pytest.raises(pickle.UnpicklingError, match="which a checkpoint does not consist of"):
            compat.read_metadata(pickle.dumps(thing))
    assert not (tmp_path / "ran").exists()


def test_a_profiler_that_listens_is_seen():
    assert not compat.profiling()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert compat.profiling()
    assert not compat.profiling()


def test_rows_are_packed_by_one_function():
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        nn.utils.rnn.pack_padded_sequence(torch.randn(2, 3, 1), torch.tensor([3, 2]), batch_first=True)
    assert compat.pack_rows in seen


def test_what_is_written_to_a_copy_of_a_part_is_written_to_the_tensor(monkeypatch):
    handlers, told = DTensor._op_dispatcher._custom_op_handlers, []
    monkeypatch.setattr(DTensor._op_dispatcher, "_custom_op_handlers", dict(handlers))
    compat.write_whole.__wrapped__(told.append)
    t = DTensor.from_local(torch.zeros(4, 2), one_rank_mesh(), [Shard(0)])
    row = t[1]
    assert type(row) is DTensor  # of one rank, it is in the tensor's memory
    row.__class__ = compat.CopiedPart
    row._local_tensor, row.__dict__["part_of"] = row.to_local().clone(), (aten.select.int, (t, 0, 1), {}, None)
    row[0] = 3.0
    row += 1
    assert type(row) is compat.CopiedPart and t.to_local().tolist() == [[0, 0], [4, 1], [0, 0], [0, 0]] and row.sum().item() == 5
    assert type(compat.call_on_parts(torch.Tensor.view, (row, 2, 1), {})) is compat.CopiedPart
    torch.manual_seed(0)
    want = torch.rand(4, 2)
    torch.manual_seed(0)
    assert torch.equal(t.uniform_().to_local(), want) and told == [t] and torch.rand_like(t).placements == (Shard(0),)
    before = compat.version(t)
    torch._foreach_mul_([t], 2.0)
    assert torch.equal(t.to_local(), want * 2) and compat.version(t) > before


def test_python_functions_of_elements_are_left_to_who_is_told(monkeypatch):
    for name in ("apply_", "map_", "map2_"):
        monkeypatch.setattr(DTensor, name, None)
    compat.apply_by(lambda t, *rest: rest)
    t = DTensor.from_local(torch.zeros(2), one_rank_mesh(), [Replicate()])
    assert t.apply_(abs) == (abs,) and t.map_(t, max) == (t, max)
