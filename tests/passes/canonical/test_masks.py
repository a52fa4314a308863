"""The passes masks and gqa: masks of models, masks that only look causal, long ones, repeated heads."""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxpar.backends.eager import run_flat
from fxpar.ops.attention import windowed_attention
from fxpar.passes.canonical import bands, constants
from fxpar.passes.canonical.gqa import fold_repeat_kv
from fxpar.passes.canonical.masks import fold_masks
from fxpar.passes.capture.capture import capture
from fxpar.plan import Plan
from fxpar.program import Program
from fxpar.sharding.mesh import from_plan
from tests import zoo  # noqa: F401  (makes transformers importable without torchvision's operators)

SDPA = torch.ops.aten.scaled_dot_product_attention.default
LONG = 131072


def captured(model: nn.Module, *args, **kwargs) -> Program:
    return capture(model, Plan(), from_plan(Plan()), args, kwargs, torch.device("cpu"))


def verdicts(program: Program) -> list[str | int]:
    """What each attention of the program does: "all", "causal", "mask", or the size of its window."""
    found: list[str | int] = []
    for n in program.graph.nodes:
        if n.target is windowed_attention:
            found.append(n.kwargs["window"])
        elif n.target is SDPA:
            causal = n.args[5] if len(n.args) > 5 else n.kwargs.get("is_causal", False)
            mask = n.args[3] if len(n.args) > 3 else n.kwargs.get("attn_mask")
            found.append("mask" if mask is not None else "causal" if causal else "all")
    return found


def run(model: nn.Module, inputs: dict[str, Tensor], program: Program | None = None) -> list[Tensor]:
    """The loss of the model, or of the program (the first output, made a scalar), then every gradient."""
    model.zero_grad()
    if program is None:
        out = model(**inputs)
    else:
        values = {**dict(model.named_parameters()), **inputs}
        out = run_flat(program.module, [values.get(s.name, s.value) for s in program.sources])
    out = out if isinstance(out, Tensor) else out[0]
    loss = out if out.dim() == 0 else out.float().square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(expected: list[Tensor], found: list[Tensor]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    scale = max(float(g.abs().max()) for g in expected[1:])
    for a, b in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * scale)


# ---- models ----

B, S, V = 2, 16, 64
SIZES = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=256)  # fmt: skip
GROUPED = dict(SIZES, num_key_value_heads=2)


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(1))


def causal_lm(cls: type, config: hf.PretrainedConfig) -> tuple[nn.Module, dict[str, Tensor]]:
    config.use_cache = False
    return cls(config), dict(input_ids=tokens(B, S), labels=tokens(B, S))


def llama():
    return causal_lm(hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED))


def mistral():
    return causal_lm(hf.MistralForCausalLM, hf.MistralConfig(**GROUPED, sliding_window=4))


def mistral_wide():
    return causal_lm(hf.MistralForCausalLM, hf.MistralConfig(**GROUPED, sliding_window=S))


def mixtral():
    config = hf.MixtralConfig(**GROUPED, sliding_window=5, num_local_experts=2, num_experts_per_tok=1)
    return causal_lm(hf.MixtralForCausalLM, config)


def gemma3():
    layers = ["sliding_attention", "full_attention"]
    config = hf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=4, layer_types=layers)
    return causal_lm(hf.Gemma3ForCausalLM, config)


def llama4():
    config = hf.Llama4TextConfig(**GROUPED, head_dim=8, attention_chunk_size=8, num_local_experts=2,
                                 interleave_moe_layer_step=3, intermediate_size_mlp=32)  # fmt: skip
    return causal_lm(hf.Llama4ForCausalLM, config)


def gpt2():
    config = hf.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0,
                           eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    return causal_lm(hf.GPT2LMHeadModel, config)


def bert():
    config = hf.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return hf.BertForMaskedLM(config), dict(input_ids=tokens(B, S))


def bert_padded():
    model, inputs = bert()
    return model, dict(inputs, attention_mask=(torch.arange(S) < torch.tensor([[S], [9]])).long())


def vit():
    config = hf.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                          image_size=16, patch_size=4)  # fmt: skip
    return hf.ViTForImageClassification(config), dict(pixel_values=torch.randn(B, 3, 16, 16))


def t5():
    config = hf.T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
                         dropout_rate=0.0, decoder_start_token_id=0, use_cache=False)  # fmt: skip
    return hf.T5ForConditionalGeneration(config), dict(input_ids=tokens(B, S), labels=tokens(B, 7))


class Encoder(nn.Module):
    """PyTorch's own encoder, told that its mask is causal or not."""

    def __init__(self, is_causal: bool):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.layers, self.is_causal = nn.TransformerEncoder(layer, 2), is_causal

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.layers(x, mask=mask, is_causal=self.is_causal)


def encoder():
    return Encoder(True), dict(x=torch.randn(B, S, 32))


def encoder_with_mask():
    return Encoder(False), dict(x=torch.randn(B, S, 32))


class Eager(nn.Module):
    """Attention of old: a triangular buffer, filled in before the softmax."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = (y.view(b, s, 4, d // 4).transpose(1, 2) for y in self.qkv(x).split(d, dim=2))
        scores = (q @ k.transpose(-2, -1)).masked_fill(self.bias[:, :, :s, :s] == 0, float("-inf"))
        return F.softmax(scores, dim=-1) @ v


def eager():
    return Eager(), dict(x=torch.randn(B, S, 32))


FAMILIES: dict[Callable, list[str | int]] = {
    llama: ["causal", "causal"],
    mistral: [4, 4],
    mistral_wide: ["causal", "causal"],
    mixtral: [5, 5],
    gemma3: [4, "causal"],
    llama4: ["mask", "mask"],  # causal within chunks: no band
    gpt2: ["causal", "causal"],
    bert: ["all", "all"],
    bert_padded: ["mask", "mask"],
    vit: ["all", "all"],
    t5: ["mask", "mask", "all"],  # learned positions in both self-attentions; cross-attention sees everything
    encoder: ["causal", "causal"],
    encoder_with_mask: ["causal", "causal"],
    eager: [],
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_families(family):
    torch.manual_seed(0)
    model, inputs = family()
    expected = run(model, inputs)
    program = captured(model, **inputs)
    placeholders = [n.name for n in program.placeholders()]
    assert fold_masks(program) is program
    assert verdicts(program) == FAMILIES[family]
    assert_same(expected, run(model, inputs, program))
    if FAMILIES[family] and "mask" not in FAMILIES[family]:  # nothing of the masks is left
        assert not [n for n in program.graph.nodes if _is_quadratic_mask(n)]
    grouped = [n for n in program.graph.nodes if n.target in (SDPA, windowed_attention)]
    fold_repeat_kv(program)
    assert [n.name for n in program.placeholders()] == placeholders
    repeats = family in (llama, mistral, mistral_wide, mixtral, gemma3)
    assert all(bool(n.kwargs.get("enable_gqa")) == repeats for n in grouped)
    assert_same(expected, run(model, inputs, program))


def _is_quadratic_mask(n: fx.Node) -> bool:
    val = n.meta.get("val")
    return isinstance(val, Tensor) and val.dtype == torch.bool and val.dim() >= 2 and min(val.shape[-2:]) == S


# ---- masks ----


class Attend(nn.Module):
    """Attention with whatever mask `make(m, q)` makes of a query, and of the model's tensors in `m`."""

    def __init__(self, make: Callable, **options):
        super().__init__()
        self.make, self.options = make, options
        self.weight = nn.Parameter(torch.zeros(S, S))

    def forward(self, q: Tensor, k: Tensor, extra: Tensor) -> Tensor:
        own = SimpleNamespace(buffer=getattr(self, "buffer", None), weight=self.weight, extra=extra)
        mask = self.make(own, q)
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask, **self.options)


def attended(make: Callable, buffer: Tensor | None = None, keys: int = S, **options) -> Program:
    model = Attend(make, **options)
    if buffer is not None:
        model.register_buffer("buffer", buffer)
    q, k = torch.randn(B, 2, S, 8), torch.randn(B, 2, keys, 8)
    inputs = dict(q=q, k=k, extra=torch.ones(S, dtype=torch.bool))
    program = captured(model, **inputs)
    random = any(constants.compat.is_random(n.target) for n in program.graph.nodes)

    def outputs() -> Tensor:
        values = [inputs.get(s.name, s.value) if s.kind != "param" else model.weight for s in program.sources]
        return run_flat(program.module, list(values))[0]

    before = None if random else outputs()
    fold_masks(program)
    if before is not None:
        torch.testing.assert_close(outputs(), before, rtol=1e-6, atol=1e-6, equal_nan=True)
    return program


def rows() -> Tensor:
    return torch.arange(S)[:, None]


def cols() -> Tensor:
    return torch.arange(S)[None, :]


def additive(allowed: Tensor, low: float = -math.inf) -> Tensor:
    return torch.where(allowed, 0.0, low)


LOWEST = torch.finfo(torch.float32).min
TRIL = torch.ones(S, S, dtype=torch.bool).tril()


def old_style(m, q):
    """Filled with the lowest number, then zeroed below the diagonal."""
    at = torch.arange(S)
    return torch.full((S, S), LOWEST).masked_fill(at < (at + 1).view(S, 1), 0)[None, None].expand(B, 1, S, S)


FOLD = {
    "tril": (lambda m, q: torch.ones(S, S, dtype=torch.bool).tril(), "causal"),
    "tril of ones_like an input": (lambda m, q: torch.ones_like(q[0, 0] @ q[0, 0].T).tril() != 0, "causal"),
    "triu of -inf": (lambda m, q: torch.full((S, S), -math.inf).triu(1), "causal"),
    "compared the other way": (lambda m, q: rows() >= cols(), "causal"),
    "difference": (lambda m, q: rows() - cols() >= 0, "causal"),
    "not above": (lambda m, q: ~(cols() > rows()), "causal"),
    "descending": (lambda m, q: (S - 1 - rows()) <= (S - 1 - cols()), "causal"),
    "int32": (lambda m, q: torch.arange(S, dtype=torch.int32) <= torch.arange(S)[:, None], "causal"),
    "transposed": (lambda m, q: torch.ones(S, S, dtype=torch.bool).triu().T, "causal"),
    "additive lowest": (lambda m, q: additive(cols() <= rows(), LOWEST), "causal"),
    "additive twice": (lambda m, q: additive(cols() <= rows()) + additive(cols() <= rows()), "causal"),
    "(1 - m) * lowest": (lambda m, q: (1.0 - (cols() <= rows()).float()) * LOWEST, "causal"),
    "old style": (old_style, "causal"),
    "zeros": (lambda m, q: torch.zeros(S, S), "all"),
    "ones": (lambda m, q: torch.ones(B, 1, 1, S, dtype=torch.bool), "all"),
    "any of two halves": (lambda m, q: (cols() <= rows()) | (cols() > rows()), "all"),
    "window": (lambda m, q: (cols() <= rows()) & (cols() > rows() - 3), 3),
    "window of one": (lambda m, q: cols() == rows(), 1),
    "window, additive": (lambda m, q: additive((rows() - cols()).clamp(min=0, max=5) == rows() - cols()), 6),
    "window, triangles": (lambda m, q: torch.ones(S, S, dtype=torch.bool).tril().triu(-3), 4),
    "repeated": (lambda m, q: (cols() <= rows()).float().log().repeat(B, 2, 1, 1), "causal"),
    "transposed, repeated": (lambda m, q: (cols() >= rows()).mT.repeat(B, 1, 1, 1), "causal"),
    "wide window": (lambda m, q: (cols() <= rows()) & (cols() > rows() - S), "causal"),
    "one document": (lambda m, q: (cols() <= rows()) & (torch.zeros(S)[:, None] == torch.zeros(S)), "causal"),
}


@pytest.mark.parametrize("name", FOLD)
def test_folds(name, monkeypatch):
    make, expected = FOLD[name]
    assert verdicts(attended(make)) == [expected]
    monkeypatch.setattr(bands, "LIMIT", 4 * S)  # and without a look at the whole
    assert verdicts(attended(make)) == [expected]


@pytest.mark.parametrize("buffer", [TRIL, TRIL.expand(B, 2, S, S), torch.ones(1, 1, 64, 64).tril() == 1])
def test_folds_buffers(buffer, monkeypatch):
    for limit in (bands.LIMIT, 4 * S):
        monkeypatch.setattr(bands, "LIMIT", limit)
        program = attended(lambda m, q: m.buffer[..., :S, :S], buffer)
        assert verdicts(program) == ["causal"]
        assert program.notes == ["the attention mask in buffer was read when the model was captured"]
        assert len(program.placeholders()) == len(program.sources) == 5


def flipped(i: int, j: int) -> Tensor:
    mask = TRIL.clone()
    mask[i, j] ^= True
    return mask


def test_one_element_less_can_be_a_window():
    assert verdicts(attended(lambda m, q: m.buffer, flipped(S - 1, 0))) == [S - 1]


def updated(m, q):
    mask = m.buffer.clone()
    m.buffer.fill_(True)
    return mask


def aliased(m, q):
    """Written to through a view."""
    mask = torch.ones(S, S, dtype=torch.bool)
    mask[:, 1:] = m.extra[1:]
    return mask


def batched(m, q):
    """The mask of one sequence causal, of the other not."""
    return torch.stack([cols() <= rows(), cols() <= rows() + 1])[:, None]


KEEP = {
    "one more": lambda m, q: (cols() <= rows()) | ((cols() == 9) & (rows() == 3)),
    "one less": lambda m, q: (cols() <= rows()) & ~((cols() == 1) & (rows() == S - 1)),
    "one ahead": lambda m, q: cols() <= rows() + 1,
    "one behind": lambda m, q: cols() < rows(),  # the first query has no key
    "anticausal": lambda m, q: cols() >= rows(),
    "no window": lambda m, q: (cols() <= rows()) & (cols() > rows()),
    "nothing": lambda m, q: torch.zeros(S, S, dtype=torch.bool),
    "nothing, additive": lambda m, q: torch.full((S, S), -math.inf),
    "two windows": lambda m, q: (cols() <= rows()) & ((cols() > rows() - 3) | (cols() < rows() - 6)),
    "both sides": lambda m, q: (cols() - rows()).abs() < 4,
    "chunks": lambda m, q: (cols() <= rows()) & (cols() // 4 == rows() // 4),
    "prefix": lambda m, q: (cols() <= rows()) | (cols() < 4),
    "every other": lambda m, q: (cols() <= rows()) & ((rows() - cols()) % 2 == 0),
    "slope 2": lambda m, q: 2 * cols() <= rows(),
    "documents": lambda m, q: (cols() <= rows()) & ((cols() >= 8) == (rows() >= 8)),
    "padding": lambda m, q: (cols() <= rows()) & m.extra,
    "padding alone": lambda m, q: m.extra.expand(S, S),
    "parameter": lambda m, q: torch.where(cols() <= rows(), m.weight, -math.inf),
    "random": lambda m, q: (cols() <= rows()) & (torch.rand(S, S) < 2),
    "query": lambda m, q: (cols() <= rows()) & (q[:, :, :, :1] == q[:, :, :, :1]),
    "low but not lowest": lambda m, q: additive(cols() <= rows(), -1e4),
    "bias": lambda m, q: additive(cols() <= rows()) + 0.5,
    "positions": lambda m, q: additive(cols() <= rows()) + (cols() - rows()) * 0.1,
    "nan": lambda m, q: additive(cols() <= rows(), math.nan),
    "aliased": aliased,
    "batched": batched,
}


@pytest.mark.parametrize("name", KEEP)
def test_keeps(name, monkeypatch):
    assert verdicts(attended(KEEP[name])) == ["mask"]
    monkeypatch.setattr(bands, "LIMIT", 4 * S)
    assert verdicts(attended(KEEP[name])) == ["mask"]


@pytest.mark.parametrize("i, j", [(0, 0), (0, S - 1), (S - 1, 1), (S - 1, S - 1), (7, 8), (8, 7)])
def test_keeps_buffers_with_one_element_flipped(i, j):
    assert verdicts(attended(lambda m, q: m.buffer, flipped(i, j))) == ["mask"]


def test_keeps_what_is_not_known():
    assert verdicts(attended(updated, TRIL.clone())) == ["mask"]
    uninitialised = attended(lambda m, q: (torch.empty(S, S) * 0 == 0) & (cols() <= rows()))
    assert verdicts(uninitialised) == ["mask"]


def test_keeps_what_the_replacement_cannot_do():
    wide = torch.ones(S, 2 * S, dtype=torch.bool)
    assert verdicts(attended(lambda m, q: m.buffer, wide.tril(), keys=2 * S)) == ["mask"]
    assert verdicts(attended(lambda m, q: m.buffer, wide, keys=2 * S)) == ["all"]
    causal = attended(lambda m, q: cols() <= rows(), dropout_p=0.1, scale=0.5)
    assert verdicts(causal) == ["causal"]
    (node,) = [n for n in causal.graph.nodes if n.target is SDPA]
    assert node.args[3:] == (None, 0.1, True) and node.kwargs == {"scale": 0.5}


def test_a_window_with_dropout_whose_kernels_are_off_stays_a_mask(dropout_written_out):
    windowed = attended(lambda m, q: (cols() <= rows()) & (cols() > rows() - 3), dropout_p=0.1)
    assert verdicts(windowed) == ["mask"] and len(windowed.notes) == 1 and "use_kernels()" in windowed.notes[0]


def test_a_window_with_dropout_where_its_kernels_are_used():
    windowed = attended(lambda m, q: (cols() <= rows()) & (cols() > rows() - 3), dropout_p=0.1)
    assert verdicts(windowed) == [3] and not windowed.notes
    (node,) = [n for n in windowed.graph.nodes if n.target is windowed_attention]
    assert node.kwargs["dropout_p"] == 0.1
    assert verdicts(attended(lambda m, q: (cols() <= rows()) & (cols() > rows() - 3), dropout_p=1.0)) == ["mask"]


def test_keeps_a_mask_that_broadcasts_the_result():
    class Broadcast(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(3, 1, S, S, dtype=torch.bool))

    program = captured(Broadcast(), q=torch.randn(1, 2, S, 8))
    fold_masks(program)
    assert verdicts(program) == ["mask"]


# ---- long sequences ----


class Made(TorchDispatchMode):
    """The largest storage that an operator returned, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


@pytest.mark.parametrize("batch, window", [(1, None), (8, None), (2, 4096)])
def test_128k(batch, window):
    sizes = {**GROUPED, "max_position_embeddings": LONG, "use_cache": False}
    if window is None:
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))
    else:
        model = hf.MistralForCausalLM(hf.MistralConfig(**sizes, sliding_window=window))
    ids = torch.zeros(batch, LONG, dtype=torch.long, device="meta")
    program = captured(model, input_ids=ids, labels=ids)
    tracemalloc.start()
    start = time.process_time()
    with Made() as made:
        fold_masks(program)
    seconds, (_, python_bytes) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    fold_repeat_kv(program)
    assert verdicts(program) == [window or "causal"] * 2
    assert made.largest <= 8 * 2 * LONG
    assert python_bytes < 100e6 and seconds < 20  # much less; this is no benchmark
    for n in program.graph.nodes:
        val = n.meta.get("val")
        assert not isinstance(val, Tensor) or val.numel() < LONG * LONG
