"""Every operator rule on its own: random arguments, random layouts, against the operator on one device."""

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpar import compat
from fxpar.passes.infer.rules import RULES
from tests.harness import MESHES, RANDOM, Gen, check, one_op
from tests.passes.infer.cases import CASES, UNDEFINED

aten = torch.ops.aten
MANY = {
    aten.linear.default,
    aten.addmm.default,
    aten.matmul.default,
    aten.einsum.default,
    aten.embedding.default,
    aten.scaled_dot_product_attention.default,
    aten.view.default,
    aten.cat.default,
    aten.slice.Tensor,
    aten.conv2d.default,
    aten.index.Tensor,
    aten.scatter_add.default,
    aten.softmax.int,
    aten.logsumexp.default,
    aten.sum.dim_IntList,
}


def applies(target) -> bool:
    """Whether a functional graph can hold the operator: it makes a tensor, writes to none, names no dims."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return True
    return not (
        schema.is_mutable
        or "name" in schema.overload_name.lower()
        or not any("Tensor" in str(r.type) for r in schema.returns)
        or target.name() in NOT_FROM_MODELS
    )


NOT_FROM_MODELS = {"aten::to.prim_Device", "aten::to.prim_dtype", "aten::to.prim_other"}  # TorchScript's


def name(target) -> str:
    return str(target) if hasattr(target, "_schema") else target.__name__


def run(r: Random, target) -> None:
    gen = Gen(r)
    args, kwargs = CASES[target](gen)
    mesh = r.choice(MESHES)
    check(one_op(r, target, args, kwargs, gen.constants), r, mesh, values=target not in UNDEFINED)


def test_every_registered_operator_has_a_case():
    missing = sorted(name(t) for t in RULES if applies(t) and t not in CASES)
    assert not missing


def test_every_case_is_of_a_registered_operator():
    assert not sorted(name(t) for t in CASES if t not in RULES and not compat.is_pointwise(t))


@pytest.mark.parametrize("target", CASES, ids=name)
def test_rule(target):
    @settings(max_examples=60 if target in MANY else 12)
    @given(RANDOM)
    def holds(r):
        run(r, target)

    holds()


@pytest.mark.slow
@pytest.mark.parametrize("target", CASES, ids=name)
def test_rule_slow(target):
    @settings(max_examples=600)
    @given(RANDOM)
    def holds(r):
        run(r, target)

    holds()


# ---- operators that PyTorch tags as pointwise: all are tried, with arguments from their schema ----


def tagged():
    """Every overload that a functional graph can hold and that has no rule of its own."""
    found = []
    for packet in sorted(dir(aten)):
        for overload in getattr(getattr(aten, packet), "overloads", list)():
            target = getattr(getattr(aten, packet), overload)
            if compat.is_pointwise(target) and applies(target) and target not in RULES and not compat.is_random(target):
                if any(a.type.kind() == "TensorType" for a in target._schema.arguments):
                    found.append(target)
    return found


MAKERS = (
    lambda g, *s: g.f(*s).abs() / 4 + 0.01,
    lambda g, *s: g.i(3, *s, low=1),
    lambda g, *s: torch.complex(g.f(*s), g.f(*s)),
)
NUMBERS = {"Scalar": 2, "number": 2, "int": 1, "float": 0.5, "bool": True}


def pointwise_call(gen: Gen, target):
    """Broadcast operands in (0, 1), else small integers, else complex; None if it takes none."""
    shape = gen.shape()
    for make in MAKERS:
        first, args, kwargs = True, [], {}
        for a in target._schema.arguments:
            kind = str(a.type)
            if kind == "Tensor" or (kind == "Optional[Tensor]" and gen.maybe(0.8)):
                value = make(gen, *(shape if first else gen.broadcast(shape)))
                first = False
            elif kind == "Optional[number]" and gen.maybe(0.8):
                value = 0.2 if make is MAKERS[0] else 2
            elif a.has_default_value():
                value = a.default_value
            else:
                value = NUMBERS.get(kind.removeprefix("Optional[").removesuffix("]"))
            if a.kwarg_only:
                kwargs[a.name] = value
            else:
                args.append(value)
        try:
            out = target(*args, **kwargs)
        except (RuntimeError, TypeError, IndexError, ValueError):
            continue
        if isinstance(out, torch.Tensor) and tuple(out.shape) == tuple(shape):
            return tuple(args), kwargs
    return None


def differentiable(args: tuple, kwargs: dict, target) -> bool:
    """Whether gradients by all float operands are defined."""
    own = [
        a.detach().clone().requires_grad_(a.is_floating_point() or a.is_complex()) if isinstance(a, torch.Tensor) else a
        for a in args
    ]
    try:
        out = target(*own, **kwargs)
        if out.requires_grad:
            torch.autograd.grad(
                out,
                [a for a in own if isinstance(a, torch.Tensor) and a.requires_grad],
                torch.ones_like(out),
                allow_unused=True,
            )
    except RuntimeError:
        return False
    return True


def test_tagged_pointwise_operators():
    tried = set()

    def attempt(target, r):
        gen = Gen(r)
        call = pointwise_call(gen, target)
        if call is not None:
            tried.add(target)
            constants = [] if differentiable(*call, target) else [a for a in call[0] if isinstance(a, torch.Tensor)]
            build = one_op(r, target, *call, constants)
            mesh = r.choice(MESHES)
            check(build, r, mesh, values=target not in UNDEFINED)

    targets = tagged()
    for target in targets:

        @settings(max_examples=6)
        @given(st.just(target), RANDOM)
        def holds(target, r):
            attempt(target, r)

        holds()
    assert {
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.gelu.default,
        aten.silu.default,
        aten.pow.Tensor_Scalar,
        aten.clamp.default,
        aten.lerp.Tensor,
        aten.sigmoid.default,
        aten.erf.default,
    } <= tried
    untried = sorted(name(t) for t in set(targets) - tried)
    assert len(untried) < len(targets) / 10, untried
