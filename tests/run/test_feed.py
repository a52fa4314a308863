"""What programs are given: inputs of any strides, parameters whatever was done to them between calls."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxpar

CHANGES = ("call", "call twice", "backward twice", "step", "freeze", "thaw", "replace", "move", "set", "hook",
           "hook after", "grad", "eval")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.out(self.table(ids)).flatten(0, 1), labels.flatten())


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(seed))


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    return tokens(seed)[:, :-1], tokens(seed)[:, 1:]


def made(backend: str = "eager") -> tuple[Net, nn.Module]:
    torch.manual_seed(0)
    plain, model = Net(), Net()
    model.load_state_dict(plain.state_dict())
    return plain, fxpar.parallelize(model, "dp=1", pair(), backend=backend)


def full_tensor(t: Tensor) -> Tensor:
    return getattr(t, "full_tensor", lambda: t)()


def same(plain: nn.Module, module: nn.Module) -> None:
    want = dict(plain.named_parameters())
    for name, p in module.named_parameters():
        assert (full_tensor(p) - want[name]).norm() <= 1e-5 * want[name].norm(), name
        assert (p.grad is None) == (want[name].grad is None), name
        if p.grad is not None:
            assert (full_tensor(p.grad) - want[name].grad).norm() <= 1e-5 * want[name].grad.norm(), name


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("strided_first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_inputs_may_have_any_strides(backend, strided_first):
    plain, module = made(backend)
    dense = tuple(t.contiguous() for t in pair())
    for batch in (pair(), dense) if strided_first else (dense, pair()):
        loss = module(*batch)
        torch.testing.assert_close(loss, plain(*batch))
        loss.backward()
        plain(*batch).backward()
    same(plain, module)


def halve(p: Tensor) -> None:
    p.grad = p.grad * 0.5


def change(what: str, model: nn.Module, seed: int) -> None:
    """One thing that a training loop may do between two calls, with the bias of the last layer."""
    bias = model.out.bias
    if what in ("call", "call twice", "backward twice"):
        loss = model(*pair(seed)) + (model(*pair(seed + 1)) if what == "call twice" else 0)
        loss.backward(retain_graph=what == "backward twice")
        if what == "backward twice":
            loss.backward()
    elif what == "step":
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.zero_grad()
    elif what in ("freeze", "thaw"):
        bias.requires_grad_(what == "thaw")
    elif what == "replace":
        model.out.bias = nn.Parameter(bias.detach() + 1)
    elif what == "hook" and bias.requires_grad:
        bias.register_hook(lambda grad: grad * 2)
    elif what == "hook after" and bias.requires_grad:
        bias.register_post_accumulate_grad_hook(halve)
    elif what == "grad":
        weights = [p for p in model.parameters() if p.requires_grad]
        for p, grad in zip(weights, torch.autograd.grad(model(*pair(seed)), weights), strict=True):
            p.grad = grad
    elif what in ("move", "set"):  # the same parameter, elsewhere
        if not hasattr(bias, "_local_tensor"):
            bias.data = bias.detach() * 2
        elif what == "move":
            bias._local_tensor = bias._local_tensor * 2
        else:
            bias._local_tensor.set_(bias._local_tensor * 2)
    elif what == "eval":
        with torch.no_grad():
            model(*pair(seed))


@settings(max_examples=3)
@given(st.lists(st.sampled_from(CHANGES), max_size=7))
def test_parameters_are_seen_as_they_are(changes):
    seen_as_they_are(changes)


@pytest.mark.slow
@settings(max_examples=200)
@given(st.lists(st.sampled_from(CHANGES), max_size=12))
def test_parameters_are_seen_as_they_are_slow(changes):
    seen_as_they_are(changes)


def seen_as_they_are(changes: list[str]) -> None:
    plain, module = made()
    for seed, what in enumerate([*changes, "call"]):
        for model in (plain, module):
            change(what, model, seed)
        same(plain, module)


def test_tensors_are_made_once():
    """As long as nothing is done to the parameters."""
    _, module = made()
    module(*pair()).backward()
    (feed,) = (c.feed for c in module._engine.compiled.values())
    first = feed._linked.local
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    module(*pair()).backward()
    assert feed._linked.local is first
    module.out.bias = nn.Parameter(module.out.bias.detach())
    module(*pair()).backward()
    assert feed._linked.local is not first and len(module._engine.compiled) == 1
    module.out.bias.requires_grad_(False)
    module(*pair()).backward()
    assert len(module._engine.compiled) == 2


def test_a_module_does_not_keep_itself():
    _, module = made()
    loss = module(*pair())
    bias, gone = module.out.bias, weakref.ref(module)
    module(*pair()).backward()
    del module
    gc.collect()
    assert gone() is None
    before = full_tensor(bias.grad).clone()
    loss.backward()
    torch.testing.assert_close(full_tensor(bias.grad), 2 * before)


def test_what_is_clipped_is_looked_up_again_when_parts_of_the_model_change():
    _, module = made()
    store = module.parameter_store
    first = store.counted()
    assert store.counted() is first and [*first] == [*module.parameters()] and all(first.values())
    module.out.bias = nn.Parameter(module.out.bias.detach().clone())
    second = store.counted()
    assert [*second] == [*module.parameters()] and any(p is module.out.bias for p in second)
    module._model.more = nn.Linear(2, 2)
    assert len(store.counted()) == len(first) + 2
    module._model.more = nn.Linear(3, 3)
    for p in module.parameters():
        p.grad = torch.full_like(p, 2.0)
    norm = module.clip_grad_norm_(1.0)
    count = sum(p.numel() for p in module.parameters())
    torch.testing.assert_close(full_tensor(norm), torch.tensor(4.0 * count).sqrt())
    assert all((full_tensor(p.grad) < 2).all() for p in module.parameters())
