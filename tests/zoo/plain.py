"""timm, and models in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.registry import BATCH, VOCAB, Built, ids, labels, model


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
