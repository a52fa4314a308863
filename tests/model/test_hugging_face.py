"""Hugging Face models as their default configs make them: with a cache, with any attention, with checkpointing."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import fxpar
from fxpar.errors import CaptureError, InputError
from fxpar.model.hugging_face import LeftOut, as_trained
from fxpar.testing import assert_equivalent
from tests.zoo import hugging_face as zoo
from tests.zoo.registry import ids, labels

PLAN = "dp=2,tp=2"


def language_model(config: str, **options):
    """A causal language model whose config says use_cache=True, which is the default."""
    import transformers

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(getattr(transformers, config)(vocab_size=zoo.VOCAB, **options))
    assert made.config.use_cache
    return made, {"input_ids": ids(), "labels": labels()}


def llama(**options):
    return language_model("LlamaConfig", **zoo.LLAMA, **options)


@pytest.mark.parametrize("config, options", [
    ("LlamaConfig", zoo.LLAMA),
    ("GPT2Config", dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    ("Qwen3MoeConfig", dict(**zoo.MOE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=8)),
])  # fmt: skip
def test_models_with_a_cache(config, options):
    model, batch = language_model(config, **options)
    assert_equivalent(model, PLAN, batch)
    assert model.config.use_cache


def test_a_cache_in_the_config_of_a_part():
    model, batch = zoo.t5()
    parts = [model.config, model.decoder.config]
    assert parts[0] is not parts[1]
    for config in parts:
        config.use_cache = True
    assert_equivalent(model, PLAN, batch)
    assert all(config.use_cache for config in parts)


def test_a_cache_in_a_config_inside_of_the_config():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = dict(**zoo.VIT, model_type="clip_vision_model")
    text = dict(**zoo.LLAMA, model_type="llama", vocab_size=zoo.VOCAB)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=5))
    tokens = torch.randint(6, zoo.VOCAB, (4, 20))
    tokens[:, 1:17] = 5
    batch = {"input_ids": tokens, "pixel_values": torch.randn(4, 3, 16, 16), "labels": tokens}
    assert model.config.text_config.use_cache
    result = fxpar.simulate(model, PLAN, batch).step(**batch)
    assert isinstance(result.outputs.past_key_values, LeftOut) and model.config.text_config.use_cache
    assert_equivalent(model, PLAN, batch)


@pytest.mark.parametrize("asked", [{}, {"use_cache": True}, {"output_hidden_states": True}])
def test_outputs_are_the_model_s_own_and_say_that_the_cache_is_left_out(asked):
    model, batch = llama()
    want = model(**batch, **asked)
    out = fxpar.parallelize(copy.deepcopy(model), fxpar.Plan(), {**batch, **asked})(**batch, **asked)
    assert type(out) is CausalLMOutputWithPast and [*out] == [*want]
    assert torch.equal(out[1], want[1]) and ("hidden_states" not in out or torch.equal(out[3][1], want[3][1]))
    assert isinstance(out.past_key_values, LeftOut) and "left out" in repr(out)
    assert isinstance(copy.deepcopy(out.past_key_values), LeftOut)
    for use in (len, iter, lambda kept: kept[0], lambda kept: kept.get_seq_length(), bool):
        with pytest.raises(InputError, match=r"keeps no cache: generate with the plain model, `with module\.gathered\(\)"):
            use(out.past_key_values)


@pytest.mark.parametrize("asked, config", [({"use_cache": False}, True), ({}, False)])
def test_nothing_is_said_of_a_cache_that_nobody_asked_for(asked, config):
    model, batch = llama()
    model.config.use_cache = config
    want = model(**batch, **asked)
    out = fxpar.parallelize(copy.deepcopy(model), fxpar.Plan(), {**batch, **asked})(**batch, **asked)
    assert [*out] == [*want] == ["loss", "logits"] and out.past_key_values is None


def test_an_encoder_has_no_cache_to_leave_out():
    model, batch = zoo.bert()
    model.config.use_cache = True
    want, out = model.eval()(**batch), fxpar.parallelize(copy.deepcopy(model).eval(), fxpar.Plan(), batch)(**batch)
    assert [*out] == [*want]
    torch.testing.assert_close(out.logits, want.logits)


def test_outputs_without_a_loss_are_compared_without_the_cache():
    model, batch = llama()
    assert_equivalent(model, PLAN, {"input_ids": batch["input_ids"]})


def test_a_cache_that_is_asked_for_is_noted():
    model, batch = llama()
    assert not fxpar.inspect(model, PLAN, batch).notes
    assert "returns no past_key_values" in fxpar.inspect(model, PLAN, {**batch, "use_cache": True}).notes[0]


def test_a_model_inside_of_another():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, _ = llama()

        def forward(self, tokens, use_cache=False):
            return self.inner(input_ids=tokens).logits * (2 if use_cache else 1)

    model = Outer()
    assert_equivalent(model, PLAN, {"tokens": ids(), "use_cache": True})
    assert model.inner.config.use_cache


def test_a_cache_among_the_outputs_says_the_way_out():
    class Cache:
        pass

    class Net(nn.Module):
        def forward(self, x):
            return x * 2, Cache()

    with pytest.raises(CaptureError, match=r"an output of a type .*Cache.*; return tensors"):
        fxpar.inspect(Net(), "dp=2", (torch.ones(2, 2),))


def test_the_config_is_put_back_after_an_error():
    model, batch = llama()
    with pytest.raises(CaptureError):
        fxpar.inspect(model, PLAN, {"input_ids": batch["input_ids"].float()})
    assert model.config.use_cache


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention", "kernels-community/flash-attn2"])
def test_attention_is_exchanged_for_one_that_can_be_traced(name, caplog):
    model, batch = llama()
    model.config._attn_implementation = name
    with caplog.at_level(logging.WARNING, "fxpar"):
        assert_equivalent(model, PLAN, batch)
    assert f"attn_implementation='{name}' cannot be traced: 'sdpa' takes its place" in caplog.text
    assert model.config._attn_implementation == name
    assert [name in n for n in fxpar.inspect(model, PLAN, batch).notes] == [True]


def test_attention_that_caps_its_logits_is_exchanged_for_one_that_caps_them():
    model, batch = language_model("Gemma2Config", **zoo.LLAMA, head_dim=8, attn_logit_softcapping=0.1)
    model.config._attn_implementation = "eager"
    want = model(**batch).loss
    model.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(fxpar.simulate(model, PLAN, batch).step(**batch).loss, want.detach())


def test_attention_of_one_part_is_exchanged():
    from transformers import LlavaConfig

    config = LlavaConfig(vision_config=zoo.VIT, text_config=zoo.LLAMA)
    config._attn_implementation = {"": "sdpa", "text_config": "flex_attention", "vision_config": "eager"}
    model = nn.Module()
    model.config, model.text = config, LlamaForCausalLM(LlamaConfig(**zoo.LLAMA))

    def found():
        return [c._attn_implementation for c in (config, config.text_config, config.vision_config)]

    with as_trained(model, {}):
        assert found() == ["sdpa", "sdpa", "eager"]
    assert found() == ["sdpa", "flex_attention", "eager"]


def test_attention_that_the_user_registered_is_kept():
    def double(module, query, key, value, attention_mask, scaling, **kwargs):
        scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * scaling
        return (scores.softmax(-1) @ value.repeat_interleave(2, 1) * 2).transpose(1, 2), None

    AttentionInterface.register("double", double)
    model, batch = llama()
    plain = model(**batch).loss
    model.config._attn_implementation = "double"
    assert_equivalent(model, PLAN, batch)
    assert not torch.allclose(fxpar.simulate(model, PLAN, batch).step(**batch).loss, plain)


def test_attention_that_was_built_in_is_refused(monkeypatch):
    model, batch = llama()
    model.config._attn_implementation = "flash_attention_2"
    monkeypatch.setattr(LlamaForCausalLM, "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(CaptureError, match=r"flash_attention_2.*LlamaForCausalLM, which was built with it; build the model with"):
        fxpar.inspect(model, PLAN, batch)
    assert model.config.use_cache


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_the_model(reentrant):
    model, batch = llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_equivalent(model.train(), PLAN, batch)
    assert "Plan(recompute=...)" in fxpar.inspect(model, PLAN, batch).notes[0]


def test_the_plain_model_is_left_as_it_was():
    model, batch = llama()
    calls = []
    weight = model.lm_head.weight
    weight.grad = torch.ones_like(weight)
    weight.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    before = {n: id(p) for n, p in model.named_parameters()}
    assert_equivalent(model, PLAN, batch)
    assert {n: id(p) for n, p in model.named_parameters()} == before and not calls
    assert bool((weight.grad == 1).all()) and all(p.grad is None for p in model.parameters() if p is not weight)
