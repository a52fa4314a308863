"""Families of transformers, shrunk by what the fields of their configs are called.

`FAMILIES` has a name ("causal/llama") for every model type of the tables by which transformers' auto classes find a model for a
task; `build` makes the model, in training mode, and a batch for it. Weights are random; nothing is downloaded.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto as auto

from tests.zoo.registry import BATCH, Built, ids, labels, padding

VOCAB, SEQ, IMAGE, LABELS = 96, 12, 64, 6
LARGEST = 3_000_000
"""Elements: a model with more was not shrunk."""

TASKS = {
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "sequence-to-sequence": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "sound": auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "ctc": auto.MODEL_FOR_CTC_MAPPING_NAMES,
    "speech-to-text": auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}


class NotShrunk(Exception):
    """A family that the table of small values does not suit."""


def _families() -> dict[str, tuple[str, str]]:
    """Name -> model type, class. A class that serves several types counts once in a task."""
    found: dict[str, tuple[str, str]] = {}
    for task, table in TASKS.items():
        seen = set()
        for kind, names in table.items():
            for name in [names] if isinstance(names, str) else list(names)[:1]:
                if name not in seen:
                    seen.add(name)
                    found[f"{task}/{kind}"] = (kind, name)
    return found


FAMILIES = _families()

SMALL: list[tuple[str, Any]] = [
    (r"vocab_size(_.*)?|.*_vocab_size|n_tokens", VOCAB),
    (r"(.*_)?(num_experts_per_tok(en)?|top_?k|num_selected_experts|moe_topk|moe_k|experts_per_token)|mask_time_length", 2),
    (r"(.*_)?(n_groups?|topk_group|num_expert_groups?|first_k_dense_replace|num_dense_layers|attn_layer_offset)", 1),
    (r"(.*_)?(n_shared_experts|num_shared_experts?)|(mamba_)?expand", 1),
    (r"num_kv_shared_layers", 0),
    (r"(.*_)?(num_(local_|routed_|moe_)?experts|n_routed_experts)", 4),
    (r"(.*_)?(num_key_value_heads|num_kv_heads|n_head_kv|num_key_value_groups)", "kv"),
    (r"(.*_)?(num_attention_heads|n_heads?|num_heads|attention_heads|heads)(_per_layer)?", 4),
    (r"(.*_)?(num_hidden_layers|n_layers?|num_layers|(encoder|decoder|num_conformer|num_encoder|num_decoder)_layers|depth|"
     r"num_hidden_groups|num_blocks|hidden_layers)", 2),
    (r"(.*_)?(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_length|seq_length|max_(encoder_|decoder_)?position_embeddings|"
     r"max_(source|target)_positions|max_sequence_length)", 64),
    (r"(.*_)?(head_dim|d_kv|d_head|attention_head_size|kv_channels|head_size|d_state|state_size|chunk_size|d_ssm)", 8),
    (r"rotary_dim|rotary_ndims|sliding_window|local_attention|attention_window", 4),
    (r"window_size", 2),
    (r"(.*_)?lora_rank", 16),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|d_inner|mlp_dim|ffn_hidden_size|n_inner|hidden_dim|ffn_size)", 64),
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|dim|emb_dim|embedding_size|d_embed|lru_width|width|bottleneck_size)", 32),
    (r"image_size", IMAGE),
    (r"patch_size", 8),
    (r"num_mel_bins|feature_size|input_feat_per_channel", 16),
]
"""What a field's name matches -> at most this; "kv": fewer heads than queries have, where the default has fewer."""

NEEDED = r"n_shared_experts|vocab_size|num_key_value_heads|head_dim|n_routed_experts|num_experts_per_tok|num_experts"
"""Fields that are None by default and that some families do not do without."""


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the same class with small values."""
    parameters = inspect.signature(type(config)).parameters
    before = {n: v for n, v in vars(config).items() if n[0] != "_"}
    out: dict[str, Any] = {}
    for name, value in before.items():
        small = _small(name, value, before, name in parameters)
        if small is not value and small != value:
            out[name] = small
    return type(config)(**out)


def _small(name: str, value: Any, before: dict[str, Any], declared: bool) -> Any:
    if isinstance(value, PreTrainedConfig):
        return shrunk(value)
    if value is None and declared and re.fullmatch(NEEDED, name):
        return _number(name, 1 << 30, before)
    if type(value) is int:
        return _number(name, value, before)
    if name == "attention_types":
        return [[["global", "local"], 1]]
    if not isinstance(value, list | tuple) or not declared:
        return value
    layers = next((before[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if type(before.get(n)) is int), -1)
    if value and all(type(v) is str for v in value) and (len(value) == layers or "type" in name):
        return [value[0], next((v for v in value if v != value[0]), value[0])]  # one layer of each kind
    if value and all(type(v) is int for v in value):
        of_layers = "layer" in name and len(value) == layers
        return type(value)([_number(name, v, before) for v in value[:2]] if of_layers else _numbers(name, list(value)))
    return value


def _number(name: str, value: int, before: dict[str, Any]) -> int:
    if re.fullmatch(r"(.*_)?token_(id|index)", name):
        return value if value < VOCAB else {"p": 0, "b": 1, "e": 2, "d": 1}.get(name[0], 3)
    small = next((small for pattern, small in SMALL if re.fullmatch(pattern, name)), value)
    if small == "kv":
        heads = next((before[n] for n in ("num_attention_heads", "n_head", "num_heads") if type(before.get(n)) is int), 1 << 30)
        small = 2 if value < heads else 4
    return min(value, small)


def _numbers(name: str, value: list[int]) -> list[int]:
    """Those of the stages of an image model."""
    if re.fullmatch(r"depths?|layers|num_blocks|num_layers|block_repeats|num_encoder_blocks|.*_depths|.*heads.*", name):
        return [min(v, 2) for v in value]
    if re.search(r"hidden_sizes|embed_dims?|dims?|channels|widths|conv_dim", name) and min(value) >= 16:
        return [16 * max(1, round(v / min(value))) for v in value]
    return value


def build(name: str, calm: bool = False) -> Built:
    """The model and its inputs: the same at every call. calm: without what drops or masks at random. Raises: `NotShrunk`."""
    import transformers

    kind, class_name = FAMILIES[name]
    cls = getattr(transformers, class_name)
    torch.manual_seed(0)
    try:
        config = CONFIG_MAPPING[kind]()
        config = shrunk(config if cls.config_class is None or isinstance(config, cls.config_class) else config.get_text_config())
        config.num_labels = LABELS
        for field in random_fields(config) if calm else ():
            setattr(config, field, 0.0)
        if name.startswith("causal/") and hasattr(config, "is_decoder"):
            config.is_decoder = True
        for field in ("pad_token_id", "decoder_start_token_id") if config.is_encoder_decoder else ("pad_token_id",):
            if getattr(config, field, None) is None:
                setattr(config, field, 0)
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(config).parameters())
        if size > LARGEST:
            raise NotShrunk(f"{size} elements")
        model = cls(config).train()
    except Exception as error:
        raise NotShrunk(str(error)) from error
    return model, _first_that_runs(name.partition("/")[0], model)


def random_fields(config: PreTrainedConfig) -> list[str]:
    """The fields of what drops or masks at random, which the config has on."""
    return [n for n, v in vars(config).items() if type(v) is float and v and re.search(r"drop|mask_.*prob|jitter", n)]


def _first_that_runs(task: str, model: nn.Module) -> dict[str, Any]:
    problem: Exception | None = None
    for shape in _shapes(model):
        inputs = batch(task, model, shape)
        try:
            with torch.no_grad():
                model(**inputs)
            return inputs
        except Exception as error:
            problem = problem or error
    raise NotShrunk(f"runs on no batch that was tried: {problem}") from problem


def _shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the main input that a model may take."""
    config = model.config
    parts = [config, *(v for v in vars(config).values() if isinstance(v, PreTrainedConfig))]
    names = ("num_mel_bins", "feature_size", "input_feat_per_channel")
    bins = next((getattr(c, n) for c in parts for n in names if hasattr(c, n)), 16)
    length = 2 * getattr(config, "max_source_positions", 32)
    if model.main_input_name == "pixel_values":
        return [(BATCH, getattr(config, "num_channels", 3), IMAGE, IMAGE)]
    if model.main_input_name == "input_values":
        return [(BATCH, 1600), (BATCH, getattr(config, "max_length", 64), bins)]
    if model.main_input_name == "input_features":
        return [(BATCH, bins, length), (BATCH, length, bins), (BATCH, length, 32), (BATCH, length, 160)]
    return [(BATCH, SEQ)]


def batch(task: str, model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """What the family takes: tokens, an image or sound, a mask of rows of different lengths, labels that some tokens lack."""
    torch.manual_seed(1)
    takes = inspect.signature(model.forward).parameters
    made: dict[str, Any] = {}
    if model.main_input_name == "input_ids":
        made["input_ids"] = ids(VOCAB, SEQ)
        if "attention_mask" in takes:
            made["attention_mask"] = padding(seq=SEQ)
    else:
        made[model.main_input_name] = torch.randn(shape)
    if "labels" in takes:
        if task == "image" or "Classification" in type(model).__name__:
            made["labels"] = torch.randint(LABELS, (BATCH,))
        elif task == "ctc":
            made["labels"] = torch.randint(1, LABELS, (BATCH, 3))
        else:
            made["labels"] = labels(VOCAB, SEQ)
    return made
