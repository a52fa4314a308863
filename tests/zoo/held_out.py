"""Families that were not looked at while the operator rules were written."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.hugging_face import BERT, LLAMA, MOE, VIT, language_model
from tests.zoo.plain import WithLoss, timm_model
from tests.zoo.registry import BATCH, HELD_OUT, SEQ, VOCAB, Built, held_out, ids, labels, padding


def _hf_lm(name: str, config_name: str, **options: Any) -> None:
    HELD_OUT[name] = lambda: language_model(config_name, **options)


_hf_lm("qwen2", "Qwen2Config", **LLAMA)
_hf_lm("qwen3", "Qwen3Config", **LLAMA, head_dim=8)
_hf_lm("phi3", "Phi3Config", **LLAMA)
_hf_lm("gemma2", "Gemma2Config", **LLAMA, head_dim=8, sliding_window=4)
_hf_lm(
    "gemma3",
    "Gemma3TextConfig",
    **LLAMA,
    head_dim=8,
    sliding_window=4,
    layer_types=["sliding_attention", "full_attention"],
)
_hf_lm("mistral_sliding", "MistralConfig", **LLAMA, sliding_window=4)
_hf_lm("llama_padded", "LlamaConfig", **LLAMA, mask=True)
_hf_lm("llama_left", "LlamaConfig", **LLAMA, mask="left")
_hf_lm("gpt2_padded", "GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=64, mask=True)
_hf_lm("gemma2_padded", "Gemma2Config", **LLAMA, head_dim=8, sliding_window=4, mask="left")
_hf_lm(
    "llama_odd",
    "LlamaConfig",
    vocab=97,
    seq=7,
    **{**LLAMA, "hidden_size": 36, "intermediate_size": 57, "num_attention_heads": 6, "num_key_value_heads": 3},
)
_hf_lm(
    "gpt_neox",
    "GPTNeoXConfig",
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
_hf_lm("gptj", "GPTJConfig", n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
_hf_lm("falcon", "FalconConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
_hf_lm(
    "falcon_new",
    "FalconConfig",
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    new_decoder_architecture=True,
)
_hf_lm(
    "falcon_alibi", "FalconConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, mask=True
)
_hf_lm("bloom", "BloomConfig", hidden_size=32, n_layer=2, n_head=4, mask=True)
_hf_lm(
    "opt",
    "OPTConfig",
    hidden_size=32,
    ffn_dim=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    mask=True,
    max_position_embeddings=64,
    word_embed_proj_dim=32,
)
_hf_lm("olmo2", "Olmo2Config", **LLAMA)
_hf_lm("stablelm", "StableLmConfig", **LLAMA)
_hf_lm("starcoder2", "Starcoder2Config", **LLAMA)
_hf_lm("mpt", "MptConfig", d_model=32, n_heads=4, n_layers=2, max_seq_len=64)
_hf_lm("mamba", "MambaConfig", hidden_size=32, state_size=4, num_hidden_layers=2)
_hf_lm(
    "deepseek_v3",
    "DeepseekV3Config",
    **{**MOE, "num_key_value_heads": 4},
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    n_shared_experts=1,
)
_hf_lm("gpt_oss", "GptOssConfig", **MOE, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=4)
_hf_lm(
    "qwen2_moe",
    "Qwen2MoeConfig",
    **MOE,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
)


@held_out("distilbert")
def distilbert() -> Built:
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    config = DistilBertConfig(vocab_size=VOCAB, dim=32, hidden_dim=64, n_layers=2, n_heads=4)
    return DistilBertForMaskedLM(config), {"input_ids": ids(), "attention_mask": padding(), "labels": labels()}


@held_out("roberta")
def roberta() -> Built:
    from transformers import RobertaConfig, RobertaForMaskedLM

    return RobertaForMaskedLM(RobertaConfig(**BERT)), {
        "input_ids": ids(),
        "attention_mask": padding(),
        "labels": labels(),
    }


@held_out("whisper")
def whisper() -> Built:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=0,
        decoder_start_token_id=1,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    made = WhisperForConditionalGeneration(config)
    return made, {"input_features": torch.randn(BATCH, 8, 16), "labels": labels()}


@held_out("bart")
def bart() -> Built:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )
    return BartForConditionalGeneration(config), {
        "input_ids": ids(seq=12),
        "attention_mask": padding(seq=12),
        "labels": labels(),
    }


@held_out("clip")
def clip() -> Built:
    from transformers import CLIPConfig, CLIPModel

    text = dict(BERT, projection_dim=16, eos_token_id=2)
    made = CLIPModel(CLIPConfig(text_config=text, vision_config=dict(VIT, projection_dim=16), projection_dim=16))
    return made, {"input_ids": ids(), "pixel_values": torch.randn(BATCH, 3, 16, 16), "return_loss": True}


@held_out("swin")
def swin() -> Built:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=8,
        drop_path_rate=0.0,
    )
    return SwinForImageClassification(config), {
        "pixel_values": torch.randn(BATCH, 3, 32, 32),
        "labels": torch.randint(8, (BATCH,)),
    }


@held_out("mlp_mixer")
def mlp_mixer() -> Built:
    from timm.models.mlp_mixer import MlpMixer

    made = MlpMixer(num_classes=8, img_size=32, patch_size=8, num_blocks=2, embed_dim=32)
    return WithLoss(made), (torch.randn(BATCH, 3, 32, 32), torch.randint(8, (BATCH,)))


@held_out("mobilenet")
def mobilenet() -> Built:
    made = timm_model("mobilenetv3_small_050", num_classes=8)
    return WithLoss(made), (torch.randn(BATCH, 3, 64, 64), torch.randint(8, (BATCH,)))


class UNet(nn.Module):
    """Down, up by a transposed convolution, and a skip connection that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.middle = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.last = nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        skip = self.down(x)
        made = self.last(torch.cat([skip, self.up(self.middle(skip))], dim=1))
        return {"loss": F.binary_cross_entropy_with_logits(made, mask), "mask": made > 0}


@held_out("unet")
def unet() -> Built:
    return UNet(), (torch.randn(BATCH, 3, 8, 8), torch.rand(BATCH, 1, 8, 8).round())


@held_out("autoencoder")
def autoencoder() -> Built:
    made = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 16),
        nn.ReLU(),
        nn.Linear(16, 128),
        nn.Unflatten(1, (8, 4, 4)),
        nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 1, 3, padding=1),
        nn.Sigmoid(),
    )
    return made, (torch.randn(BATCH, 1, 8, 8),)


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module], **options: Any):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 16), nn.Linear(32, VOCAB)
        self.cell = cell(16, 32, num_layers=2, batch_first=True, **options)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        y, _ = self.cell(self.embed(x))
        return F.cross_entropy(self.head(y).transpose(1, 2), target)


@held_out("lstm")
def lstm() -> Built:
    return Recurrent(nn.LSTM), (ids(), ids())


@held_out("gru")
def gru() -> Built:
    return Recurrent(nn.GRU), (ids(), ids())


class CellByCell(nn.Module):
    """A recurrence that the model unrolls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(VOCAB, 16), nn.LSTMCell(16, 32), nn.Linear(32, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(x.shape[0], 32)
        made = []
        for t in range(x.shape[1] - 1):
            h, c = self.cell(self.embed(x[:, t]), (h, c))
            made.append(self.head(h))
        return F.cross_entropy(torch.stack(made, 1).flatten(0, 1), x[:, 1:].flatten())


@held_out("lstm_cell")
def lstm_cell() -> Built:
    return CellByCell(), (ids(),)


class Clicks(nn.Module):
    """Bags of categories and dense features, as in recommendation models."""

    def __init__(self) -> None:
        super().__init__()
        kinds = ((40, "sum"), (24, "mean"), (32, "sum"))
        self.bags = nn.ModuleList(nn.EmbeddingBag(rows, 16, mode=mode) for rows, mode in kinds)
        self.dense = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(22, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense: Tensor, categories: Tensor, clicked: Tensor) -> Tensor:
        parts = [self.dense(dense), *(bag(categories[:, i]) for i, bag in enumerate(self.bags))]
        features = torch.stack(parts, dim=1)
        products = torch.bmm(features, features.transpose(1, 2))
        row, column = torch.tril_indices(4, 4, offset=-1)
        y = torch.cat([parts[0], products[:, row, column]], dim=1)
        return F.binary_cross_entropy_with_logits(self.top(y).squeeze(1), clicked)


@held_out("dlrm")
def dlrm() -> Built:
    return Clicks(), (torch.randn(BATCH, 6), torch.randint(24, (BATCH, 3, 5)), torch.rand(BATCH).round())


@held_out("encoder_padded")
def encoder_padded() -> Built:
    class Encoder(nn.Module):
        """nn.TransformerEncoder, whose evaluation mode has a fast path, with a padding mask."""

        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, "gelu", batch_first=True, norm_first=True)
            self.embed, self.head = nn.Embedding(VOCAB, 32), nn.Linear(32, 3)
            self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32), enable_nested_tensor=False)

        def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
            return self.head(self.encoder(self.embed(x), src_key_padding_mask=hidden)[:, 0])

    return Encoder(), (ids(), padding() == 0)


@held_out("multihead_attention")
def multihead_attention() -> Built:
    class Cross(nn.Module):
        """Keys and values of other widths, the weights returned and used."""

        def __init__(self) -> None:
            super().__init__()
            self.same = nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True)
            self.cross = nn.MultiheadAttention(32, 4, kdim=16, vdim=24, batch_first=True, add_bias_kv=True)

        def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            x = x + self.same(x, x, x)[0]
            return self.cross(x, keys, values)

    return Cross(), (torch.randn(BATCH, SEQ, 32), torch.randn(BATCH, 6, 16), torch.randn(BATCH, 6, 24))
