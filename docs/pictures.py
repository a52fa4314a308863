"""Draw the pictures of docs/images anew: two reports as a browser shows them, and one as a terminal does.

    python docs/pictures.py        in the repository's root; needs a Chromium in PATH, or named in the variable CHROMIUM
"""

import io
import os
import pathlib
import runpy
import shutil
import subprocess
import tempfile

import PIL.Image
import PIL.ImageChops
import rich.console
import torch
import transformers

import fxpar

IMAGES = pathlib.Path(__file__).parent / "images"
PAGES = {"report-llama3-70b.png": "llama3_70b", "report-mixtral.png": "mixtral_8x7b"}
"""File -> the configuration of examples/production whose report it shows."""
WIDE, HIGH = 1200, 9000
"""Of the browser's window; what is empty below the page is cut off."""


def browser():
    """Chromium."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    return found or exit("no Chromium: install one, or name it in the variable CHROMIUM")


def photographed(page, file):
    """Write what a browser shows of a page to a file."""
    with tempfile.TemporaryDirectory() as folder:
        shot = pathlib.Path(folder) / "shot.png"
        subprocess.run([browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                        f"--window-size={WIDE},{HIGH}", "--virtual-time-budget=4000", f"--user-data-dir={folder}/profile",
                        f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=120)
        seen = PIL.Image.open(shot).convert("RGB")
    empty = PIL.Image.new("RGB", seen.size, seen.getpixel((0, seen.height - 1)))
    bottom = PIL.ImageChops.difference(seen, empty).getbbox()[3]
    seen.crop((0, 0, WIDE, bottom + 24)).quantize(128).save(file, optimize=True)


def pages():
    """The reports of `PAGES`."""
    production = runpy.run_path("examples/production/run.py")
    for name, config in PAGES.items():
        with tempfile.TemporaryDirectory() as folder:
            page = production["report_of"](production["read"](config)).save_html(pathlib.Path(folder) / "report.html")
            photographed(page, IMAGES / name)


def terminal():
    """A report as `rich.print` shows it."""
    config = transformers.LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                                      num_key_value_heads=8, vocab_size=128256, use_cache=False)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    tokens = torch.zeros(8, 4096, dtype=torch.long, device="meta")
    plan = "dp=4,tp=2,zero=3,param_dtype=bf16,outputs=loss"
    console = rich.console.Console(width=132, record=True, file=io.StringIO(), force_terminal=True)
    console.print(f"[bold]$[/] python -m fxpar inspect Llama-3.2-1B --plan {plan} --batch 8 --seq 4096\n")
    console.print(fxpar.inspect(model, plan, {"input_ids": tokens, "labels": tokens}))
    console.save_svg(str(IMAGES / "terminal.svg"), title="fxpar")


if __name__ == "__main__":
    terminal()
    pages()
