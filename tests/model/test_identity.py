"""What a program does with parameters before `parallelize` (optimizers, hooks, attributes, references) counts afterwards."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import OrderedDict
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrizations import weight_norm

import fxpar
from fxpar.errors import FxparError, InputError, MismatchError, PlanError
from tests.harness import RANDOM
from tests.processes import launch

PLANS = ["dp=2", "dp=2,zero=1", "dp=2,zero=2", "dp=2,zero=3", "tp=2"]


class Net(nn.Module):
    """A tied weight, and one that a parametrization makes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.linear = nn.Embedding(12, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.gate, self.head = weight_norm(nn.Linear(8, 8)), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + F.gelu(self.linear(self.norm(x))) * torch.sigmoid(self.gate(x))
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.roll(1, 1).flatten())


def model() -> Net:
    torch.manual_seed(0)
    return Net()


def batch() -> Tensor:
    return torch.randint(12, (8, 6), generator=torch.Generator().manual_seed(1))


def full(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


# ---- programs ----


class Program:
    """A training program: what it does to a plain model first, and then to it or to what `parallelize` made of it."""

    def __init__(self, r: Random):
        self.how = r.choice(["optimizer", "groups", "ids", "attributes", "tuple", "per parameter"])
        self.kind = r.choice(["sgd", "foreach", "fused"])
        names = [n for n, _ in model().named_parameters()]
        self.plain = r.sample(names, 3)
        self.hooks = [(r.choice(names), r.choice(["mask", "clamp", "in place", "see", "after"]), r.random() < 0.3)
                      for _ in range(r.choice([0, 1, 3]))]
        self.frozen = r.choice(names) if r.random() < 0.5 else None
        self.ran = r.random() < 0.3

    def __repr__(self) -> str:
        return f"Program({vars(self)})"

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        if self.kind == "sgd":
            return torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
        return torch.optim.Adam(parameters, lr=0.03, eps=0.1, **{self.kind: True})

    def groups(self, without: list[Tensor], others: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": without, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.1}]

    def before(self, net: nn.Module) -> None:
        self.seen: dict[tuple[int, ...], list[float]] = {}
        named = dict(net.named_parameters())
        if self.frozen:
            named[self.frozen].requires_grad_(False)
            self.melt = lambda p=named[self.frozen]: p.requires_grad_(True)
        if self.ran:
            net(batch()).backward()
        without, others = [named[n] for n in self.plain], [p for n, p in named.items() if n not in self.plain]
        self.made = self.groups(without, others)
        self.ids = {id(p) for p in without}
        self.kept = tuple(named.values())
        for p in without:
            p.without = True
        if self.how == "optimizer":
            self.own = self.optimizer(self.made)
        hooks = [(self.hook(named[name], kind), gone) for name, kind, gone in self.hooks if named[name].requires_grad]
        self.handles = [handle for handle, gone in hooks if gone]
        if self.how == "per parameter":
            self.each = {p: torch.optim.SGD([p], lr=0.3) for p in named.values()}
            for p in [p for p in named.values() if p.requires_grad]:
                p.register_post_accumulate_grad_hook(self.update)

    def update(self, p: Tensor) -> None:
        self.each[p].step()
        self.each[p].zero_grad()

    def hook(self, p: Tensor, kind: str) -> Any:
        mask = torch.arange(p.numel()).reshape(p.shape) % 3 > 0
        if kind == "after":
            return p.register_post_accumulate_grad_hook(lambda p: (p.grad.clamp_(-0.02, 0.02), None)[1])
        return p.register_hook({
            "mask": lambda g: g * mask,
            "clamp": lambda g: g.clamp(-0.01, 0.01),
            "in place": lambda g: (g.mul_(mask), None)[1],
            "see": lambda g: self.seen.setdefault(tuple(g.shape), []).append(g.norm().item()),
        }[kind])

    def after(self, net: nn.Module) -> torch.optim.Optimizer | None:
        everything = list(net.parameters())
        if self.how == "per parameter":
            return None
        if self.how == "optimizer":
            return self.own
        if self.how == "groups":
            return self.optimizer(self.made)
        if self.how == "ids":
            return self.optimizer(self.groups([p for p in everything if id(p) in self.ids],
                                              [p for p in everything if id(p) not in self.ids]))
        if self.how == "attributes":
            return self.optimizer(self.groups([p for p in everything if hasattr(p, "without")],
                                              [p for p in everything if not hasattr(p, "without")]))
        return self.optimizer(self.kept)

    def run(self, net: nn.Module, part: Any = lambda ids: ids) -> dict[str, Any]:
        optimizer, losses = self.after(net), []
        for step in range(3):
            if step == 1 and self.frozen:
                self.melt()
            if step == 2:
                for handle in self.handles:
                    handle.remove()
            for i, ids in enumerate(batch().chunk(2)):
                with net.no_sync() if i == 0 and hasattr(net, "no_sync") else contextlib.nullcontext():
                    loss = net(part(ids)) / 2
                    loss.backward()
                losses.append(loss.item())
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
        return {"losses": losses, "seen": self.seen, "state": {n: full(p) for n, p in net.named_parameters()}}


def same(have: dict[str, Any], want: dict[str, Any]) -> None:
    assert have["losses"] == pytest.approx(want["losses"], rel=1e-5)
    assert have["seen"].keys() == want["seen"].keys()
    for shape, norms in want["seen"].items():  # of parameters of one shape, in any order
        assert sorted(have["seen"][shape]) == pytest.approx(sorted(norms), rel=1e-4)
    for name, value in want["state"].items():
        torch.testing.assert_close(have["state"][name], value, rtol=1e-4, atol=1e-6)


def plainly(program: Program) -> dict[str, Any]:
    net = model()
    program.before(net)
    return program.run(net)


def in_parallel(rank: int, program: Program, plan: str) -> dict[str, Any]:
    net, dp = model(), fxpar.Plan.parse(plan).dp
    program.before(net)
    module = fxpar.parallelize(net, plan, (batch().chunk(2)[0].chunk(dp)[0],), backend="eager")
    return program.run(module, lambda ids: ids.chunk(dp)[rank % dp])


@settings(max_examples=5)
@given(RANDOM)
def test_programs_go_on(r):
    program = Program(r)
    same(in_parallel(0, program, "dp=1"), plainly(program))


def several(rank: int, programs: list[Program], plan: str) -> list[dict[str, Any]]:
    return [in_parallel(rank, p, plan) for p in programs]


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_programs_go_on_on_two_ranks(plan):
    r = Random(plan)
    programs = [Program(r) for _ in range(4)]
    for have in launch(2, several, programs, plan):
        for mine, program in zip(have, programs, strict=True):
            same(mine, plainly(copy.deepcopy(program)))


# ---- references ----


class Slotted:
    __slots__ = ("p",)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 4)


def parallel(net: nn.Module, plan: str = "dp=1") -> fxpar.ParallelModule:
    return fxpar.parallelize(net, plan, (torch.ones(2, 4),), backend="eager")


def default(p: Tensor) -> Any:
    def function(p: Tensor = p) -> Tensor:
        return p

    return function


def test_whoever_held_a_parameter_holds_the_dtensor():
    net, thing, slotted = linear(), nn.Module(), Slotted()
    slotted.p = net.weight
    object.__setattr__(thing, "p", net.weight)
    held: list[Any] = [net.weight, {"p": net.weight}, {net.weight: 1}, {net.weight}, (1, (net.weight, 2)), default(net.weight),
                       functools.partial(len, net.weight), lambda p=net.weight: p, [id(net.weight)], {id(net.weight): "p"}]
    ordered, shared = OrderedDict([("a", 1), (net.weight, 2), ("b", 3)]), nn.ParameterList([net.weight])
    module = parallel(net)
    p = module.weight
    assert isinstance(p, DTensor) and p is net.weight
    found = [held[0], held[1]["p"], *held[2], *held[3], held[4][1][0], held[5](), held[6].args[0], held[7](), thing.p, slotted.p,
             list(ordered)[1], shared[0]]
    assert all(x is p for x in found) and held[8] == [id(p)] and held[9] == {id(p): "p"}
    assert list(ordered.values()) == [1, 2, 3]


def test_a_local_variable_passes_on_what_is_done_with_it():
    net = linear()
    w = net.weight
    module = parallel(net)
    w.register_hook(lambda g: g * 2)
    module(torch.ones(2, 4)).sum().backward()
    torch.testing.assert_close(full(w.grad), torch.full((4, 4), 4.0))
    assert w.shape == (4, 4) and w.placements == module.weight.placements and repr(w) == repr(module.weight)
    assert isinstance(w, DTensor) and isinstance(w, nn.Parameter) and (w == module.weight).to_local().all()
    torch.testing.assert_close(full(torch.autograd.grad(module(torch.ones(2, 4)).sum(), [w])[0]), torch.full((4, 4), 4.0))
    before = full(module.weight)
    torch.optim.SGD([w], lr=1.0).step()
    torch.testing.assert_close(full(module.weight), before - 4)
    w.requires_grad = False
    w.grad = None
    w.marked = True
    assert not module.weight.requires_grad and module.weight.grad is None and module.weight.marked
    assert torch.equal(full(copy.deepcopy(w)), full(w))


def test_attributes_hooks_and_gradients_go_with_the_parameter():
    net = linear()
    net.weight.mark, net.weight.grad = {"a": 1}, torch.ones(4, 4)
    handle = net.weight.register_hook(lambda g: g * 0)
    module = parallel(net)
    module(torch.ones(2, 4)).sum().backward()
    torch.testing.assert_close(full(module.weight.grad), torch.ones(4, 4))
    handle.remove()
    module(torch.ones(2, 4)).sum().backward()
    torch.testing.assert_close(full(module.weight.grad), torch.full((4, 4), 3.0))
    assert module.weight.mark == {"a": 1}


def test_hooks_and_attributes_outlive_a_change_of_dtype():
    net = linear()
    net.weight.mark = 1
    net.weight.register_hook(lambda g: g * 0)
    optimizer = torch.optim.SGD(net.parameters())
    module = parallel(net).double()
    module(torch.ones(2, 4).double()).sum().backward()
    assert full(module.weight.grad).abs().max() == 0 and full(module.bias.grad).min() == 2
    assert optimizer.param_groups[0]["params"][0] is module.weight and module.weight.mark == 1


def test_initialisation_sees_attributes():
    class Marked(nn.Linear):
        def reset_parameters(self) -> None:
            super().reset_parameters()
            if getattr(self.bias, "ones", False):
                nn.init.ones_(self.bias)

    with torch.device("meta"):
        net = Marked(4, 4)
    net.bias.ones = True
    module = parallel(net)
    module.init_weights(0)
    assert torch.equal(full(module.bias), torch.ones(4)) and full(module.weight).abs().max() <= 0.5


# ---- what cannot be kept is refused ----


class Own(nn.Parameter):
    pass


def own_class(net: nn.Linear) -> Any:
    net.weight = Own(net.weight.detach())


def node_of(net: nn.Linear) -> Any:
    node = net.weight.expand_as(net.weight).grad_fn.next_functions[0][0]
    return node, node.register_hook(lambda *_: None)


def state_of(net: nn.Linear) -> Any:
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("does, said", [
    (own_class, "parameter 'weight' of class Own"),
    (node_of, "parameter 'weight' whose AccumulateGrad node the program holds"),
    (state_of, "parameter 'weight', for which a Adam has state already"),
])  # fmt: skip
def test_what_cannot_be_kept_is_refused(does, said):
    net = linear()
    kept = does(net)
    with pytest.raises(PlanError, match=r"; try an? ") as error:
        parallel(net)
    assert said in str(error.value) and type(net.bias) is nn.Parameter
    del kept


def test_a_graph_of_before_is_no_obstacle_but_cannot_be_run():
    net = linear()
    loss = net(torch.ones(2, 4)).sum()
    module = parallel(net)
    with pytest.raises(InputError, match="a forward that ran before"):
        loss.backward()
    module(torch.ones(2, 4)).sum().backward()


def test_a_hook_after_accumulation_that_mixes_plain_tensors_is_named():
    net, mask = linear(), torch.ones(4, 4)
    net.weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(mask))
    module = parallel(net)
    with pytest.raises(InputError, match=r"hook .*<lambda> \(.*test_identity.py:\d+\) .* parameter 'weight'.*`register_hook`"):
        module(torch.ones(2, 4)).sum().backward()


def ran_on_one(rank: int) -> str:
    net = linear()
    if rank:
        net(torch.ones(2, 4)).sum().backward()
    with pytest.raises(MismatchError) as error:
        parallel(net, "dp=2")
    return str(error.value)


@pytest.mark.multiproc
def test_a_gradient_on_one_rank_is_an_error_on_all():
    for said in launch(2, ran_on_one):
        assert "parameter 'bias' has a gradient on rank 1 and none on rank 0" in said


def used_on_one(rank: int) -> str:
    net = linear()
    kept = state_of(net) if rank else None
    with pytest.raises(FxparError) as error:
        parallel(net, "dp=2")
    del kept
    return str(error.value)


@pytest.mark.multiproc
def test_a_refusal_on_one_rank_is_an_error_on_all():
    for said in launch(2, used_on_one):
        assert "for which a Adam has state already" in said
