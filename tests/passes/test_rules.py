"""Every operator rule on its own: random arguments, random layouts, against the operator on one device."""

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpar import compat
from fxpar.passes.rules import RULES
from tests.harness import MESHES, Gen, check, one_op
from tests.passes.cases import CASES, UNDEFINED

aten = torch.ops.aten
MANY = {aten.linear.default, aten.addmm.default, aten.matmul.default, aten.einsum.default, aten.embedding.default,
        aten.scaled_dot_product_attention.default, aten.view.default, aten.cat.default, aten.slice.Tensor,
        aten.conv2d.default, aten.index.Tensor, aten.softmax.int, aten.logsumexp.default, aten.sum.dim_IntList}


def applies(target) -> bool:
    """Whether a functional graph can hold the operator: it has a tensor to make, writes to none, names no dims."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return True
    types = [str(a.type) for a in schema.arguments]
    return not (schema.is_mutable or any("Dimname" in t for t in types)
                or not any("Tensor" in str(r.type) for r in schema.returns) or target.name() in NOT_FROM_MODELS)


NOT_FROM_MODELS = {"aten::to.prim_Device", "aten::to.prim_dtype", "aten::to.prim_other"}  # TorchScript's


def operator(target):
    """The operator itself; Hugging Face's, which rules give by name, is defined when this is imported."""
    if not isinstance(target, str):
        return target
    import transformers.integrations.moe  # noqa: F401

    library, _, function = target.partition("::")
    return getattr(getattr(torch.ops, library), function).default


def name(target) -> str:
    return str(target) if hasattr(target, "_schema") else getattr(target, "__name__", target)


def run(r: Random, target) -> None:
    gen = Gen(r)
    args, kwargs = CASES[target](gen)
    mesh = r.choice(MESHES)
    check(one_op(r, operator(target), args, kwargs, gen.constants), r, mesh, values=target not in UNDEFINED)


def test_every_registered_operator_has_a_case():
    missing = sorted(name(t) for t in RULES if applies(t) and t not in CASES)
    assert not missing


def test_every_case_is_of_a_registered_operator():
    assert not sorted(name(t) for t in CASES if t not in RULES and not compat.is_pointwise(t))


@pytest.mark.parametrize("target", CASES, ids=name)
def test_rule(target):
    @settings(max_examples=60 if target in MANY else 15)
    @given(st.randoms(use_true_random=False))
    def holds(r):
        run(r, target)

    holds()


@pytest.mark.slow
@pytest.mark.parametrize("target", CASES, ids=name)
def test_rule_slow(target):
    @settings(max_examples=600)
    @given(st.randoms(use_true_random=False))
    def holds(r):
        run(r, target)

    holds()
