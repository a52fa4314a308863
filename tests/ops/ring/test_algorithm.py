"""Ring attention of all ranks in lock step, against attention on one device in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings

from fxpar.ops.ring import blocks, costs
from fxpar.ops.ring.algorithm import backward, forward
from fxpar.ops.ring.drive import RingTransfer, lock_step
from fxpar.ops.ring.kernels import CPU, CUDNN, EFFICIENT, FLASH, MATH, BlockKernel, Seen
from fxpar.ops.ring.schedule import RingSchedule
from tests.harness import RANDOM
from tests.ring_cases import Case, in_lock_step, off, random_case


@settings(max_examples=50)
@given(RANDOM)
def test_equals_one_device(r):
    case = random_case(r)
    assert off(in_lock_step(case), case.whole()) < 1e-6


@settings(max_examples=20)
@given(RANDOM)
def test_equals_one_device_in_float64(r):
    case = random_case(r, torch.float64)
    assert off(in_lock_step(case), case.whole()) < 1e-13


@settings(max_examples=15)
@given(RANDOM)
def test_masks_in_tiles(r):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "TILE", r.choice([1, 8, 20]))
        patch.setattr(blocks, "ROWS", r.choice([1, 3]))
        case = random_case(r)
        assert off(in_lock_step(case), case.whole()) < 1e-6


@settings(max_examples=15)
@given(RANDOM)
def test_plain_products(r):
    """What is left where no kernel can do it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "choose", lambda *_: MATH)
        patch.setattr(blocks, "for_masks", lambda *_: MATH)
        patch.setattr(blocks, "TILE", r.choice([2**24, 50]))
        case = random_case(r)
        assert off(in_lock_step(case), case.whole()) < 1e-6


@pytest.mark.slow
@settings(max_examples=3000)
@given(RANDOM)
def test_equals_one_device_many_times(r):
    test_equals_one_device.hypothesis.inner_test(r)


@settings(max_examples=30)
@given(RANDOM)
def test_in_bf16_little_is_lost_to_the_merge(r):
    """Not more than what a kernel of the whole sequence loses, and a little."""
    case = random_case(r, torch.bfloat16)
    assert off(in_lock_step(case), case.whole()) < 8e-3


def test_a_rank_that_sees_nothing_of_another():
    """Documents end where parts of the sequence do."""
    for zigzag in (False, True):
        q, k, v = (torch.randn(2, 2, 32, 8) for _ in range(3))
        documents = torch.arange(32)[None] // 8
        case = Case(4, q, k, v, {"q_segments": documents, "kv_segments": documents}, {"causal": True, "zigzag": zigzag})
        assert off(in_lock_step(case), case.whole()) < 1e-6


def test_queries_without_keys():
    valid = torch.zeros(1, 16, dtype=torch.bool)
    case = Case(4, *(torch.randn(1, 2, 16, 8) for _ in range(3)), {"kv_valid": valid}, {"causal": True, "zigzag": True})
    assert all(not x.any() for x in in_lock_step(case))
    found = lock_step([forward(case.rank(r)) for r in range(4)])
    assert all((lse == -math.inf).all() for _, lse in found)


def counting(asking, sent: list[int], rank: int):
    """The same generator; what its transfers send is added to ``sent[rank]``."""
    answer = None
    while True:
        try:
            asked = asking.send(answer)
        except StopIteration as done:
            return done.value
        if isinstance(asked, RingTransfer):
            sent[rank] += sum(asked.sent)
        answer = yield asked


def counted(case: Case) -> tuple[list[int], list[int]]:
    """Bytes that each rank sent, forward and backward."""
    ranks = [case.rank(r) for r in range(case.ranks)]
    there, back = [0] * case.ranks, [0] * case.ranks
    found = lock_step([counting(forward(rank), there, r) for r, rank in enumerate(ranks)])
    lock_step([counting(backward(rank, case.cut(case.grad, r), *found[r]), back, r) for r, rank in enumerate(ranks)])
    return there, back


@settings(max_examples=20)
@given(RANDOM)
def test_costs_are_what_is_sent_and_seen(r):
    case = random_case(r)
    there, back = counted(case)
    k, v = (case.cut(x, 0).shape for x in (case.k, case.v))
    ids = [(case.cut(t, 0, 1).shape, t.dtype) for name, t in case.ids.items() if name != "q_segments"]
    assert costs.traffic_bytes(case.schedule, k, v, case.q.dtype, ids) == (max(there), max(back))
    case.ids = {}
    seen = [case.cut(case.seen(), rank).sum().item() // len(case.q) for rank in range(case.ranks)]
    assert costs.pairs_seen(case.schedule) == max(seen)
    q = case.cut(case.q, 0).shape
    scores, sums = (2 * q[0] * q[1] * max(seen) * width for width in (q[3], v[3]))
    assert costs.flops(case.schedule, q, v) == (scores + sums, 3 * scores + 2 * sums)


def test_the_workspace_is_that_of_a_rank():
    """It does not grow with the number of ranks; in a window it grows with what is reached, and is less than that of a ring."""
    q, k = (1, 8, 64, 16), (1, 2, 64, 16)

    def needed(ranks: int, window: int | None = None) -> tuple[int, int]:
        return costs.workspace_bytes(RingSchedule(ranks, 64, 64, True, True, window), q, k, k, torch.bfloat16)

    assert needed(1) < needed(2) == needed(8)
    assert needed(4, 2) < needed(4, 8) < needed(4, 16)
    assert needed(4, 2)[0] < needed(4)[0]
    keys, out = 2 * 64 * 16 * 2 * 2, 8 * 64 * 16
    assert needed(2)[0] == 2 * keys + out * (4 + 2) + 2 * 8 * 64 * 4  # two blocks; the sum and a part; two log-sum-exps


@pytest.mark.parametrize("zigzag", [False, True])
def test_a_window_has_what_it_reaches_travel_and_no_more(zigzag):
    q, k, v = torch.randn(1, 6, 64, 8), torch.randn(1, 2, 64, 8), torch.randn(1, 2, 64, 8)
    each = 2 * 2 * 8 * 4  # K and V of a position
    case = Case(4, q, k, v, settings={"causal": True, "zigzag": zigzag, "window": 4})
    there, back = counted(case)
    if zigzag:
        assert there == [3 * each * n for n in (1, 2, 2, 1)]  # the ends have one neighbour, or the other chunk is it
    else:
        assert there == [3 * each] * 3 + [0]
    assert sum(back) == 2 * sum(there)
    whole, _ = counted(Case(4, q, k, v, settings={"causal": True, "zigzag": zigzag}))
    assert whole == [3 * 16 * each] * 4


@pytest.mark.parametrize("kernel", [CPU, MATH], ids=lambda k: k.name)
@pytest.mark.parametrize("how", ["all", "causal", "mask"])
def test_a_block_contributes_its_part_of_the_gradient(kernel: BlockKernel, how):
    """The backward of one block of two is told the result over both."""
    case = Case(1, torch.randn(2, 4, 8, 8), torch.randn(2, 2, 16, 8), torch.randn(2, 2, 16, 8))
    mask = torch.ones(2, 1, 8, 16, dtype=torch.bool)
    if how == "causal":
        mask[..., 8:] = torch.ones(8, 8, dtype=torch.bool).tril()
    elif how == "mask":
        mask = torch.rand(2, 1, 8, 16) < 0.7
    mask[..., 0] = True
    scale = 8**-0.5
    out, lse = MATH.forward(case.q, case.k, case.v, Seen(mask=mask), scale)
    wants = MATH.backward(case.grad, case.q, case.k, case.v, out, lse, Seen(mask=mask), scale)
    dq = torch.zeros_like(wants[0])
    for keys in (slice(0, 8), slice(8, 16)):
        seen = {"all": Seen(), "causal": Seen(causal=keys.start == 8), "mask": Seen(mask=mask[..., keys])}[how]
        part, dk, dv = kernel.backward(case.grad, case.q, case.k[:, :, keys], case.v[:, :, keys], out, lse, seen, scale)
        assert off([dk, dv], [g[:, :, keys] for g in wants[1:]]) < 1e-6
        dq += part
    assert off([dq], [wants[0]]) < 1e-6


@pytest.mark.parametrize("kernel, seen", [
    (FLASH, Seen()), (FLASH, Seen(causal=True)), (FLASH, Seen(band=(5, 0))), (CUDNN, Seen()), (CUDNN, Seen(causal=True)),
    (EFFICIENT, Seen()), (EFFICIENT, Seen(causal=True)),
    (EFFICIENT, Seen(mask=torch.ones(2, 1, 40, 40, dtype=torch.bool, device="meta"))),
], ids=lambda x: getattr(x, "name", None))  # fmt: skip
def test_kernels_of_gpus_are_called_as_they_are_declared(kernel, seen):
    """Without elements: the operators take these arguments, and their results have these shapes."""
    q, k = (torch.empty(2, 40, h, 20, dtype=torch.bfloat16, device="meta").transpose(1, 2) for h in (6, 2))
    v = k if kernel is not EFFICIENT else k[..., :12]
    out, lse = kernel.forward(q, k, v, seen, 0.3)
    assert out.shape == (*q.shape[:3], v.shape[3]) and lse.shape == q.shape[:3] and lse.dtype == torch.float32
    grads = kernel.backward(torch.empty_like(out), q, k, v, out, lse, seen, 0.3)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_memory_efficient_attention_repeats_heads_and_adds_their_gradients(monkeypatch):
    """As on a GPU, whose operators are played by plain products of as many heads of keys as of queries."""
    def forwards(q, k, v, bias, *_, scale):
        assert q.shape[1] == k.shape[1]
        out, lse = MATH.forward(q, k, v, Seen(mask=None if bias is None else bias == 0), scale)
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=math.inf)

    def backwards(grad, q, k, v, bias, out, lse, *_, scale):
        assert lse.shape[2] % 32 == 0
        seen = Seen(mask=None if bias is None else bias == 0)
        return *MATH.backward(grad, q, k, v, out, lse[..., : q.shape[2]], seen, scale), None

    aten = torch.ops.aten
    monkeypatch.setattr(aten._scaled_dot_product_efficient_attention, "default", forwards, raising=False)
    monkeypatch.setattr(aten._scaled_dot_product_efficient_attention_backward, "default", backwards, raising=False)
    q, k, v = torch.randn(2, 6, 12, 5), torch.randn(2, 2, 10, 5), torch.randn(2, 2, 10, 6)
    for mask in (None, (torch.rand(2, 1, 12, 10) < 0.8).index_fill(3, torch.tensor([0]), True)):
        seen, grad = Seen(mask=mask), torch.randn(2, 6, 12, 6)
        out, lse = EFFICIENT.forward(q, k, v, seen, 0.4)
        want = MATH.forward(q, k, v, seen, 0.4)
        assert off([out, lse], want) < 1e-6
        assert off(EFFICIENT.backward(grad, q, k, v, *want, seen, 0.4), MATH.backward(grad, q, k, v, *want, seen, 0.4)) < 1e-6
