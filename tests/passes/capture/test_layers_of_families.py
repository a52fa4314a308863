"""Layers of Hugging Face's models that are equal are traced once, and the program is node for node that of a trace of each."""

import pytest
import torch
import transformers as tf

from tests.passes.capture.test_layers import check  # noqa: F401

TINY = dict(vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, use_cache=False)
KEYS = dict(num_key_value_heads=2, head_dim=8)
FAMILIES = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TINY, intermediate_size=64, num_key_value_heads=2)), 3),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, use_cache=False)), 3),
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(**TINY, intermediate_size=64)), 3),
    "gemma3": (lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**TINY, **KEYS, intermediate_size=64, sliding_window=8,
                                                                sliding_window_pattern=2)), 2),
    "qwen3": (lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**TINY, **KEYS, intermediate_size=64)), 3),
    "mixtral": (lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**TINY, intermediate_size=32, num_key_value_heads=2,
                                                               num_local_experts=4)), 3),
    "gpt_oss": (lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**TINY, **KEYS, intermediate_size=32, num_local_experts=4,
                                                             num_experts_per_tok=2, sliding_window=8)), 2),
    "t5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4, use_cache=False, decoder_start_token_id=0)), 5),
    "falcon": (lambda: tf.FalconForCausalLM(tf.FalconConfig(**TINY)), 3),
    "mamba": (lambda: tf.MambaForCausalLM(tf.MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=4, use_cache=False)), 3),
    "vit": (lambda: tf.ViTForImageClassification(tf.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8)), 3),
}
DEFAULT = ("bert",)


@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_families(check, name):  # noqa: F811
    make, expected = FAMILIES[name]
    with torch.device("meta"):
        model = make().train()
    tokens = torch.zeros(2, 16, dtype=torch.long)
    inputs = dict(pixel_values=torch.zeros(2, 3, 16, 16), labels=tokens[:, 0]) if name == "vit" else dict(
        input_ids=tokens, labels=tokens)
    if name == "mamba":
        make()(**inputs)  # its first forward in a process imports kernels: that layer is traced by itself
    assert check(lambda: model, inputs) == expected
