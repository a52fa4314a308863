"""Small models of many families, as their authors wrote them: what every plan is tried on.

``MODELS`` maps a name to a builder of ``(model, example_inputs)``. Weights are random; nothing is downloaded.
``HELD_OUT`` has the families that were not looked at while the operator rules were written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, Any]
Builder = Callable[[], Built]
MODELS: dict[str, Builder] = {}
HELD_OUT: dict[str, Builder] = {}

BATCH, SEQ, VOCAB = 4, 8, 96


def _stand_ins() -> torch.library.Library | None:
    """Where torchvision's compiled operators do not load, let it be imported (timm does). It may lie in the environment's
    folder "vision", apart from the rest."""
    sys.path.append(str(Path(sys.prefix) / "vision"))
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        made = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            made.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return made
    return None


_operators = _stand_ins()  # they exist as long as this does


def _register(table: dict[str, Builder], name: str) -> Callable[[Builder], Builder]:
    return lambda build: table.setdefault(name, build)


model, held_out = partial(_register, MODELS), partial(_register, HELD_OUT)


def build(name: str) -> Built:
    """The model, in training mode, and its inputs: the same at every call."""
    torch.manual_seed(0)
    made, inputs = {**MODELS, **HELD_OUT}[name]()
    return made.train(), inputs


def ids(vocab: int = VOCAB, seq: int = SEQ, batch: int = BATCH) -> Tensor:
    return torch.randint(1, vocab, (batch, seq))


def labels(vocab: int = VOCAB, seq: int = SEQ, batch: int = BATCH) -> Tensor:
    """Some tokens are not labelled, and more of them in some rows than in others."""
    made = ids(vocab, seq, batch)
    made[0, : seq // 2] = -100
    made[1, -1] = -100
    return made


def padding(batch: int = BATCH, seq: int = SEQ) -> Tensor:
    """An attention mask of 1 and 0 with rows of different lengths."""
    return (torch.arange(seq) < torch.tensor([seq - i % 3 for i in range(batch)])[:, None]).long()


# ---- Hugging Face ----


def language_model(config_name: str, vocab: int = VOCAB, seq: int = SEQ, mask: bool = False, **options: Any) -> Built:
    """A causal language model from its config class, by name."""
    import transformers

    config = getattr(transformers, config_name)(vocab_size=vocab, use_cache=False, **options)
    inputs = {"input_ids": ids(vocab, seq), "labels": labels(vocab, seq)}
    if mask:
        inputs["attention_mask"] = padding(seq=seq)
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


# ---- timm ----


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **options)


@model("timm_vit")
def timm_vit() -> Built:
    made = timm_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=8
    )
    return WithLoss(made), (torch.randn(BATCH, 3, 32, 32), torch.randint(8, (BATCH,)))


@model("timm_convnext")
def timm_convnext() -> Built:
    made = timm_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=8)
    return WithLoss(made), (torch.randn(BATCH, 3, 64, 64), torch.randint(8, (BATCH,)))


class WithLoss(nn.Module):
    """A classifier and its cross-entropy."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), target)


# ---- plain PyTorch ----


class CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        qkv = self.c_attn(x).split(c, dim=2)
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in qkv)
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        y = self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))
        return F.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalAttention(width, heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """In the manner of nanoGPT: fused qkv, learned positions, tied head, the loss made in forward."""

    def __init__(self, vocab: int = VOCAB, width: int = 32, heads: int = 4, layers: int = 2, dropout: float = 0.1):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(64, width)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device)))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-100)


@model("nanogpt")
def nanogpt() -> Built:
    return NanoGPT(), (ids(), labels())


class Translator(nn.Module):
    """nn.Transformer between two embeddings and a head."""

    def __init__(self, batch_first: bool):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.transformer = nn.Transformer(32, 4, 2, 2, 64, batch_first=batch_first)
        self.head = nn.Linear(32, VOCAB)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        length = target.shape[1 if self.transformer.batch_first else 0]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        y = self.transformer(self.embed(source), self.embed(target), tgt_mask=mask, tgt_is_causal=True)
        return self.head(y)


@model("transformer")
def transformer() -> Built:
    return Translator(batch_first=False), (ids(seq=12).T.contiguous(), ids().T.contiguous())


@model("transformer_batch_first")
def transformer_batch_first() -> Built:
    return Translator(batch_first=True), (ids(seq=12), ids())


class Residual(nn.Module):
    def __init__(self, channels: int, made: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, made, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(made, made, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(made), nn.BatchNorm2d(made), nn.BatchNorm2d(made)
        self.skip = nn.Conv2d(channels, made, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return F.relu(y + self.bn3(self.skip(x)), inplace=True)


@model("resnet")
def resnet() -> Built:
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        Residual(8, 16),
        Residual(16, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 8),
    )
    return WithLoss(made), (torch.randn(BATCH, 3, 16, 16), torch.randint(8, (BATCH,)))


@model("mlp")
def mlp() -> Built:
    made = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))
    return WithLoss(made), (torch.randn(BATCH, 16), torch.randint(8, (BATCH,)))


@model("mlp_norm")
def mlp_norm() -> Built:
    made = nn.Sequential(
        nn.Linear(16, 64), nn.LayerNorm(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4)
    )
    return made, (torch.randn(2 * BATCH, 16),)


# ---- families that were held out ----


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


# ---- single difficulties ----


def oddity(forward: Callable[..., Any], *inputs: Any, **modules: Any) -> Built:
    """A model of these modules (parameters, buffers) with this forward, which takes the model first."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in modules.items():
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    self.register_buffer(name, value)
                else:
                    setattr(self, name, value)

    Odd.forward = forward
    return Odd(), inputs


@held_out("shared_block")
def shared_block() -> Built:
    """One block twice, one table as embedding, as head and transposed."""

    def forward(self, x, target):
        h = self.embed(x)
        for _ in range(2):
            h = h + self.down(F.silu(self.up(h)))
        h = h + (h @ self.embed.weight.T).softmax(-1) @ self.embed.weight
        return F.cross_entropy(F.linear(h, self.embed.weight).flatten(0, 1), target.flatten())

    return oddity(forward, ids(), labels(), embed=nn.Embedding(VOCAB, 32), up=nn.Linear(32, 64), down=nn.Linear(64, 32))


@held_out("buffers")
def buffers() -> Built:
    """A counter, a running mean over the batch, and a codebook, all written in forward."""

    def forward(self, x):
        self.steps += 1
        self.average.mul_(0.9).add_(0.1 * x.detach().mean(0))
        self.book[:2] = x.detach()[:2] * 2
        return self.down(torch.relu(self.up(x - self.average))) * self.steps

    return oddity(
        forward,
        torch.randn(BATCH, 16),
        up=nn.Linear(16, 32),
        down=nn.Linear(32, 16),
        steps=torch.zeros((), dtype=torch.long),
        average=torch.zeros(16),
        book=torch.ones(8, 16),
    )


@held_out("outputs")
def outputs() -> Built:
    """A dict with a tuple, None, numbers, integers and booleans; an input that is returned."""

    def forward(self, x, target, weight=None):
        logits = self.head(torch.relu(self.body(x)))
        return {
            "logits": logits,
            "parts": (logits.argmax(-1), logits > 0, None),
            "count": target.ne(0).sum(),
            "n": 3,
            "same": x,
            "top": logits.topk(2),
            "loss": F.cross_entropy(logits, target),
        }

    return oddity(
        forward, torch.randn(BATCH, 16), torch.randint(8, (BATCH,)), body=nn.Linear(16, 32), head=nn.Linear(32, 8)
    )


@held_out("graph")
def graph() -> Built:
    """Message passing: gather by edge, scatter-add to node."""

    def forward(self, nodes, edges):
        h = self.embed(nodes)
        for _ in range(2):
            message = torch.relu(self.message(torch.cat([h[edges[0]], h[edges[1]]], -1)))
            h = h + self.update(torch.zeros_like(h).index_add_(0, edges[1], message))
            h = h.scatter_add(0, edges[0][:, None].expand_as(message), message)
        return h.mean(0)

    return oddity(
        forward,
        torch.randn(8, 6),
        torch.randint(8, (2, 20)),
        embed=nn.Linear(6, 32),
        message=nn.Linear(64, 32),
        update=nn.Linear(32, 32),
    )


@held_out("size_one")
def size_one() -> Built:
    """One head, one key, one class."""

    def forward(self, x, y):
        q, k, v = self.q(x).unsqueeze(1), self.k(y).unsqueeze(1), self.v(y).unsqueeze(1)
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return F.binary_cross_entropy_with_logits(self.head(h).squeeze(-1), (x[..., 0] > 0).float())

    return oddity(
        forward,
        torch.randn(BATCH, SEQ, 8),
        torch.randn(BATCH, 1, 8),
        q=nn.Linear(8, 8),
        k=nn.Linear(8, 8),
        v=nn.Linear(8, 8),
        head=nn.Linear(8, 1),
    )


@held_out("dropouts")
def dropouts() -> Built:
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Dropout2d(0.3),
        nn.SELU(inplace=True),
        nn.AlphaDropout(0.2),
        nn.Flatten(),
        nn.Linear(128, 32),
        nn.FeatureAlphaDropout(0.2),
        nn.Linear(32, 4),
    )
    return made, (torch.randn(BATCH, 3, 4, 4),)


@held_out("dense_experts")
def dense_experts() -> Built:
    """Every token to every expert, by einsum; the auxiliary loss is a product of means."""

    def forward(self, x):
        gate = self.router(x).softmax(-1)
        h = F.gelu(torch.einsum("bsd,edf->besf", x, self.up))
        y = torch.einsum("besf,efd,bse->bsd", h, self.down, gate)
        used = F.one_hot(gate.argmax(-1), 4).float().mean((0, 1))
        return y.square().mean() + (used * gate.mean((0, 1))).sum() + gate.logsumexp(-1).square().mean()

    return oddity(
        forward,
        torch.randn(BATCH, SEQ, 16),
        router=nn.Linear(16, 4),
        up=nn.Parameter(torch.randn(4, 16, 32) / 4),
        down=nn.Parameter(torch.randn(4, 32, 16) / 6),
    )


@held_out("lora")
def lora() -> Built:
    """Frozen weights beside ones that are trained, and an input that wants a gradient."""

    def forward(self, x):
        h = torch.relu(self.up(x) + F.linear(F.linear(x, self.a), self.b))
        return self.down(h).square().mean()

    up, down = nn.Linear(16, 64).requires_grad_(False), nn.Linear(64, 16).requires_grad_(False)
    return oddity(
        forward,
        torch.randn(BATCH, SEQ, 16, requires_grad=True),
        up=up,
        down=down,
        a=nn.Parameter(torch.randn(4, 16)),
        b=nn.Parameter(torch.randn(64, 4)),
    )


@held_out("contrastive")
def contrastive() -> Built:
    """Every row of the batch against every other, and labels made in forward."""

    def forward(self, x, y):
        a, b = F.normalize(self.left(x), dim=-1), F.normalize(self.right(y), dim=-1)
        similar = a @ b.T * self.scale.exp()
        target = torch.arange(len(x))
        return (F.cross_entropy(similar, target) + F.cross_entropy(similar.T, target)) / 2

    return oddity(
        forward,
        torch.randn(8, 16),
        torch.randn(8, 12),
        left=nn.Linear(16, 32),
        right=nn.Linear(12, 32),
        scale=nn.Parameter(torch.tensor(1.0)),
    )


@held_out("convolutions")
def convolutions() -> Built:
    """Audio-like: grouped and depthwise convolutions, group norm, GLU, padding, resampling, weight norm."""

    def forward(self, x):
        h = self.grouped(F.glu(self.first(F.pad(x, (2, 0))), dim=1))
        h = self.norm(self.depthwise(h)) + h
        h = F.interpolate(F.avg_pool1d(h, 2), scale_factor=2.0)
        return self.last(F.leaky_relu(h))

    last = nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 2, 1))
    return oddity(
        forward,
        torch.randn(BATCH, 4, 16),
        first=nn.Conv1d(4, 32, 3),
        last=last,
        norm=nn.GroupNorm(4, 16),
        grouped=nn.Conv1d(16, 16, 3, padding=1, groups=4),
        depthwise=nn.Conv1d(16, 16, 3, padding=1, groups=16),
    )


@held_out("linear_attention")
def linear_attention() -> Built:
    """Kernel attention by cumulative sums: the sequence cannot be split, heads can."""

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 8).unbind(2)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("bshd,bshe->bshde", k, v).cumsum(1)
        weight = torch.einsum("bshd,bshd->bsh", q, k.cumsum(1))
        y = torch.einsum("bshd,bshde->bshe", q, state) / weight.unsqueeze(-1)
        return self.out(y.flatten(2)).square().mean()

    return oddity(forward, torch.randn(BATCH, SEQ, 32), qkv=nn.Linear(32, 96), out=nn.Linear(32, 32))


@held_out("fused_mlp")
def fused_mlp() -> Built:
    """Gate and up in one weight, interleaved; a mask that is averaged over."""

    def forward(self, x, mask):
        gate, up = self.both(x)[..., ::2], self.both(x)[..., 1::2]
        y = self.down(F.silu(gate) * up) + self.second(torch.cat([x, x.flip(1)], -1)).chunk(2, -1)[0]
        return (y * mask[..., None]).sum() / mask.sum()

    return oddity(
        forward,
        torch.randn(BATCH, SEQ, 16),
        padding().float(),
        both=nn.Linear(16, 64),
        down=nn.Linear(32, 16),
        second=nn.Linear(32, 32),
    )
