"""Small models of many families, as their authors wrote them: what every plan is tried on.

``MODELS`` maps a name to a builder of ``(model, example_inputs)``. Weights are random; nothing is downloaded.
``HELD_OUT`` has the families that were not looked at while the operator rules were written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, Any]
MODELS: dict[str, Callable[[], Built]] = {}
HELD_OUT: dict[str, Callable[[], Built]] = {}

BATCH, SEQ, VOCAB = 4, 8, 96


def _stand_ins() -> torch.library.Library | None:
    """Where torchvision's compiled operators do not load, let it (and so transformers and timm) be imported."""
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


def _add(table: dict[str, Callable[[], Built]], name: str) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    def register(build: Callable[[], Built]) -> Callable[[], Built]:
        table[name] = build
        return build

    return register


def model(name: str) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    return _add(MODELS, name)


def held_out(name: str) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    return _add(HELD_OUT, name)


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


LLAMA = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
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


BERT = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64)  # fmt: skip


@model("bert")
def bert() -> Built:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**BERT)), {
        "input_ids": ids(), "attention_mask": padding(), "labels": labels()}  # fmt: skip


@model("bert_classifier")
def bert_classifier() -> Built:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**BERT, num_labels=3)), {
        "input_ids": ids(), "attention_mask": padding(), "labels": torch.randint(3, (BATCH,))}  # fmt: skip


VIT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16,
           patch_size=4)  # fmt: skip


@model("vit")
def vit() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**VIT, num_labels=8)), {
        "pixel_values": torch.randn(BATCH, 3, 16, 16), "labels": torch.randint(8, (BATCH,))}  # fmt: skip


@model("t5")
def t5() -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, use_cache=False,
                      decoder_start_token_id=0)  # fmt: skip
    return T5ForConditionalGeneration(config), {
        "input_ids": ids(seq=12), "attention_mask": padding(seq=12), "labels": labels()}  # fmt: skip


@model("mixtral")
def mixtral() -> Built:
    return language_model("MixtralConfig", **MOE, num_local_experts=4, num_experts_per_tok=2)


@model("qwen3_moe")
def qwen3_moe() -> Built:
    return language_model("Qwen3MoeConfig", **MOE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                          head_dim=8)  # fmt: skip


# ---- timm ----


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **options)


@model("timm_vit")
def timm_vit() -> Built:
    made = timm_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=8)
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
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in self.c_attn(x).split(c, dim=2))
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        return F.dropout(self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c)), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalAttention(width, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """In the manner of nanoGPT: fused qkv, learned positions, tied head, the loss made in forward."""

    def __init__(self, vocab: int = VOCAB, width: int = 32, heads: int = 4, layers: int = 2, dropout: float = 0.1):
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(vocab, width), nn.Embedding(64, width), nn.Dropout(dropout)
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
    made = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
                         Residual(8, 16), Residual(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 8))  # fmt: skip
    return WithLoss(made), (torch.randn(BATCH, 3, 16, 16), torch.randint(8, (BATCH,)))


@model("mlp")
def mlp() -> Built:
    made = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))
    return WithLoss(made), (torch.randn(BATCH, 16), torch.randint(8, (BATCH,)))


@model("mlp_norm")
def mlp_norm() -> Built:
    made = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 32), nn.Tanh(),
                         nn.Linear(32, 4))  # fmt: skip
    return made, (torch.randn(2 * BATCH, 16),)


# ---- families that were held out ----


def _hf_lm(name: str, config_name: str, **options: Any) -> None:
    HELD_OUT[name] = lambda: language_model(config_name, **options)


_hf_lm("qwen2", "Qwen2Config", **LLAMA)
_hf_lm("qwen3", "Qwen3Config", **LLAMA, head_dim=8)
_hf_lm("phi3", "Phi3Config", **LLAMA)
_hf_lm("gemma2", "Gemma2Config", **LLAMA, head_dim=8, sliding_window=4)
_hf_lm("gemma3", "Gemma3TextConfig", **LLAMA, head_dim=8, sliding_window=4, layer_types=[
    "sliding_attention", "full_attention"])  # fmt: skip
_hf_lm("mistral_sliding", "MistralConfig", **LLAMA, sliding_window=4)
_hf_lm("llama_padded", "LlamaConfig", **LLAMA, mask=True)
_hf_lm("llama_odd", "LlamaConfig", vocab=97, seq=7, **{**LLAMA, "hidden_size": 36, "intermediate_size": 57,
       "num_attention_heads": 6, "num_key_value_heads": 3})  # fmt: skip
_hf_lm("gpt_neox", "GPTNeoXConfig", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
       max_position_embeddings=64)  # fmt: skip
_hf_lm("gptj", "GPTJConfig", n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
_hf_lm("falcon", "FalconConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
_hf_lm("falcon_new", "FalconConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
       new_decoder_architecture=True)  # fmt: skip
_hf_lm("falcon_alibi", "FalconConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, mask=True)
_hf_lm("bloom", "BloomConfig", hidden_size=32, n_layer=2, n_head=4, mask=True)
_hf_lm("opt", "OPTConfig", hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, mask=True,
       max_position_embeddings=64, word_embed_proj_dim=32)  # fmt: skip
_hf_lm("olmo2", "Olmo2Config", **LLAMA)
_hf_lm("stablelm", "StableLmConfig", **LLAMA)
_hf_lm("starcoder2", "Starcoder2Config", **LLAMA)
_hf_lm("mpt", "MptConfig", d_model=32, n_heads=4, n_layers=2, max_seq_len=64)
_hf_lm("mamba", "MambaConfig", hidden_size=32, state_size=4, num_hidden_layers=2)
_hf_lm("deepseek_v3", "DeepseekV3Config", **{**MOE, "num_key_value_heads": 4}, n_routed_experts=4, num_experts_per_tok=2,
       n_group=2, topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
       moe_intermediate_size=32, first_k_dense_replace=1, n_shared_experts=1)  # fmt: skip
_hf_lm("gpt_oss", "GptOssConfig", **MOE, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=4)
_hf_lm("qwen2_moe", "Qwen2MoeConfig", **MOE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
       shared_expert_intermediate_size=32)  # fmt: skip


@held_out("distilbert")
def distilbert() -> Built:
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    return DistilBertForMaskedLM(DistilBertConfig(vocab_size=VOCAB, dim=32, hidden_dim=64, n_layers=2, n_heads=4)), {
        "input_ids": ids(), "attention_mask": padding(), "labels": labels()}  # fmt: skip


@held_out("roberta")
def roberta() -> Built:
    from transformers import RobertaConfig, RobertaForMaskedLM

    return RobertaForMaskedLM(RobertaConfig(**BERT)), {
        "input_ids": ids(), "attention_mask": padding(), "labels": labels()}  # fmt: skip


@held_out("whisper")
def whisper() -> Built:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(vocab_size=VOCAB, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
                           encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
                           max_source_positions=8, max_target_positions=16, pad_token_id=0, decoder_start_token_id=1,
                           bos_token_id=1, eos_token_id=2, use_cache=False)  # fmt: skip
    return WhisperForConditionalGeneration(config), {"input_features": torch.randn(BATCH, 8, 16), "labels": labels()}


@held_out("bart")
def bart() -> Built:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
                        use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
                        forced_eos_token_id=2)  # fmt: skip
    return BartForConditionalGeneration(config), {
        "input_ids": ids(seq=12), "attention_mask": padding(seq=12), "labels": labels()}  # fmt: skip


@held_out("clip")
def clip() -> Built:
    from transformers import CLIPConfig, CLIPModel

    text = dict(BERT, projection_dim=16, eos_token_id=2)
    made = CLIPModel(CLIPConfig(text_config=text, vision_config=dict(VIT, projection_dim=16), projection_dim=16))
    return made, {"input_ids": ids(), "pixel_values": torch.randn(BATCH, 3, 16, 16), "return_loss": True}


@held_out("swin")
def swin() -> Built:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
                        num_labels=8, drop_path_rate=0.0)  # fmt: skip
    return SwinForImageClassification(config), {
        "pixel_values": torch.randn(BATCH, 3, 32, 32), "labels": torch.randint(8, (BATCH,))}  # fmt: skip


@held_out("mlp_mixer")
def mlp_mixer() -> Built:
    from timm.models.mlp_mixer import MlpMixer

    made = MlpMixer(num_classes=8, img_size=32, patch_size=8, num_blocks=2, embed_dim=32)
    return WithLoss(made), (torch.randn(BATCH, 3, 32, 32), torch.randint(8, (BATCH,)))


@held_out("mobilenet")
def mobilenet() -> Built:
    made = timm_model("mobilenetv3_small_050", num_classes=8)
    return WithLoss(made), (torch.randn(BATCH, 3, 32, 32), torch.randint(8, (BATCH,)))


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
    made = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.ReLU(),
                         nn.Linear(16, 128), nn.Unflatten(1, (8, 4, 4)), nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1),
                         nn.ReLU(), nn.ConvTranspose2d(4, 1, 3, padding=1), nn.Sigmoid())  # fmt: skip
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
        self.bags = nn.ModuleList(nn.EmbeddingBag(n, 16, mode=m) for n, m in ((40, "sum"), (24, "mean"), (32, "sum")))
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
            layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True, activation="gelu")
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
