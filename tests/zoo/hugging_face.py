"""Models of Hugging Face."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.registry import BATCH, SEQ, VOCAB, Built, ids, labels, model, padding


def language_model(config_name: str, vocab: int = VOCAB, seq: int = SEQ, mask: bool | str = False,
                   **options: Any) -> Built:
    """A causal language model from its config class, by name. mask: with a padded batch, on the right or on the "left"."""
    import transformers

    config = getattr(transformers, config_name)(vocab_size=vocab, use_cache=False, **options)
    inputs = {"input_ids": ids(vocab, seq), "labels": labels(vocab, seq)}
    if mask:
        inputs["attention_mask"] = padding(seq=seq).flip(1) if mask == "left" else padding(seq=seq)
    return transformers.AutoModelForCausalLM.from_config(config), inputs


LLAMA = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MOE = {**LLAMA, "experts_implementation": "grouped_mm"}


@model("llama")
def llama() -> Built:
    return language_model("LlamaConfig", **LLAMA)


@model("llama_tied")
def llama_tied() -> Built:
    return language_model("LlamaConfig", **LLAMA, tie_word_embeddings=True)


@model("gpt2")
def gpt2() -> Built:
    return language_model("GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=64)


BERT = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)


@model("bert")
def bert() -> Built:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**BERT)), {"input_ids": ids(), "attention_mask": padding(), "labels": labels()}


@model("bert_classifier")
def bert_classifier() -> Built:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**BERT, num_labels=3)), {
        "input_ids": ids(),
        "attention_mask": padding(),
        "labels": torch.randint(3, (BATCH,)),
    }


VIT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
)


@model("vit")
def vit() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**VIT, num_labels=8)), {
        "pixel_values": torch.randn(BATCH, 3, 16, 16),
        "labels": torch.randint(8, (BATCH,)),
    }


@model("t5")
def t5() -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        use_cache=False,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config), {
        "input_ids": ids(seq=12),
        "attention_mask": padding(seq=12),
        "labels": labels(),
    }


@model("mixtral")
def mixtral() -> Built:
    return language_model("MixtralConfig", **MOE, num_local_experts=4, num_experts_per_tok=2)


@model("qwen3_moe")
def qwen3_moe() -> Built:
    return language_model(
        "Qwen3MoeConfig", **MOE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=8
    )
