"""What a plan would do to Llama-3 8B on eight GPUs: layouts, collectives, memory, FLOPs.

    python examples/inspect_plan.py

Runs on a laptop: no GPU, no processes, no weights.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxpar

config = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rope_theta=500000.0,
    use_cache=False,
)
with torch.device("meta"):  # shapes only: 8 billion parameters take no memory
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    tokens = torch.zeros(2, 8192, dtype=torch.long)

print(fxpar.inspect(model, fxpar.Plan(dp=2, tp=4), dict(input_ids=tokens, labels=tokens)))
