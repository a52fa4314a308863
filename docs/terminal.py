"""Draw images/terminal.svg: a report as a terminal shows it. ``python docs/terminal.py``, in the repository's root."""

import io
import pathlib

import rich.console
import torch
import transformers

import fxpar

config = transformers.LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                                  num_key_value_heads=8, vocab_size=128256, use_cache=False)
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config)
tokens = torch.zeros(8, 4096, dtype=torch.long, device="meta")
plan = "dp=4,tp=2,zero=3,param_dtype=bf16,outputs=loss"
console = rich.console.Console(width=132, record=True, file=io.StringIO(), force_terminal=True)
console.print(f"[bold]$[/] python -m fxpar inspect Llama-3.2-1B --plan {plan} --batch 8 --seq 4096\n")
console.print(fxpar.inspect(model, plan, {"input_ids": tokens, "labels": tokens}))
console.save_svg(str(pathlib.Path(__file__).parent / "images" / "terminal.svg"), title="fxpar")
