"""A report as a page: it is one document that loads nothing, has every part, and says what the report says.

``python -m pytest -m browser`` opens pages in Chromium, too (any that is in PATH, or that the variable CHROMIUM names).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxpar
from fxpar.errors import FxparError
from fxpar.report.html.page import page
from fxpar.report.words import layout_words, many, mesh_words
from fxpar.sharding.mesh import Mesh

VOID = ("meta", "br", "img", "input", "link", "hr", "wbr")


class Page(HTMLParser):
    """The elements of a page; every one that opens has to close."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def of(self, tag: str, name: str = "") -> list[dict[str, str | None]]:
        """Attributes of all elements of a kind, and of a class."""
        return [a for t, a in self.seen if t == tag and name in (a.get("class") or "").split() + [""]]

    @property
    def text(self) -> str:
        return " ".join(self.words)


class Tower(nn.Module):
    """Layers of two products with a residual, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(16), "up": nn.Linear(16, 64), "down": nn.Linear(64, 16)})
                                    for _ in range(4))
        self.head = nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["down"](torch.relu(layer["up"](layer["norm"](x))))
        return self.head(x).square().sum()


@pytest.fixture(scope="module")
def reports() -> dict[str, fxpar.Report]:
    """One capture, three plans."""
    plans = ["dp=2,tp=2,zero=3", "pp=2,dp=2,virtual_stages=2,schedule=interleaved1f1b,microbatches=4", "dp=1"]
    made = fxpar.inspect(Tower(), plans, (torch.empty(32, 8, 16),))
    return dict(zip(("sharded", "pipeline", "alone"), made, strict=True))


@pytest.fixture(scope="module")
def pages(reports) -> dict[str, str]:
    return {name: page(report) for name, report in reports.items()}


def test_a_page_has_every_part_and_loads_nothing(pages):
    found = {name: Page(text) for name, text in pages.items()}
    sections = {name: [a["id"] for a in made.of("section")] for name, made in found.items()}
    assert sections["sharded"][:6] == ["ranks", "layers", "traffic", "passes", "memory", "block"]
    assert sections["pipeline"][:7] == ["ranks", "layers", "traffic", "passes", "pipeline", "memory", "block"]
    for text in pages.values():
        assert not re.search(r"(src|href)=\"(?!#)|url\(|@import|https?://(?!www\.w3\.org)", text)
        assert "prefers-color-scheme: dark" in text and str(Path(__file__).parent) not in text


def test_ranks_are_drawn_with_the_axes_that_group_them(pages):
    found = Page(pages["sharded"])
    assert sorted(int(a["data-rank"]) for a in found.of("g", "cell")) == [0, 1, 2, 3]
    assert [(a["data-stride"], a["data-count"]) for a in found.of("button", "axis")] == [("2", "2"), ("1", "2")]
    assert "ffn" in found.text and " of layers.up, layers.down" in found.text


def test_equal_layers_are_told_once(pages, reports):
    found = Page(pages["sharded"])
    assert found.text.count("down.weight") == 1 and "4 equal layers" in found.text
    assert "ffn64" not in found.text and reports["sharded"].grouped()[0][1] == 4


def test_what_is_computed_and_communicated_is_on_a_clock(pages):
    found = Page(pages["sharded"])
    said = [a["data-t"] for a in found.of("rect", "bar")]
    assert any(re.match(r"all_reduce over tp for layers\.2\.down: .*\ntest_page\.py:\d+", t) for t in said)
    assert any(t.startswith("gathered again: all_gather over dp for layers.1.down: ") for t in said)
    assert any(t.startswith("layers.3: computes") for t in said)


def test_the_schedule_has_every_microbatch_of_every_stage(pages):
    said = [a["data-t"] for a in Page(pages["pipeline"]).of("rect", "bar")]
    for stage in range(4):
        for microbatch in range(4):
            for kind in ("forward", "backward"):
                assert sum(t.startswith(f"{kind}, stage {stage}, microbatch {microbatch}\n") for t in said) == 1


def test_memory_is_drawn_by_kind_and_adds_up_to_the_peak(pages, reports):
    for name, report in reports.items():
        kinds = {a["data-t"].partition(":")[0] for a in Page(pages[name]).of("path", "area")}
        assert kinds >= {"parameters", "optimizer state", "gradients", "activations"}
        most = max(sum(m.parts) for m in report.peak.curve)
        assert most == report.peak.bytes if report.pipeline is None else 0.5 * report.peak.bytes < most <= report.peak.bytes
    actions = reports["pipeline"].pipeline.schedule.actions
    assert {len(peak.curve) for peak in reports["pipeline"].pipeline.peaks} == {len(each) for each in actions}


def test_a_block_has_its_collectives_lines_and_layouts(pages):
    found = Page(pages["sharded"])
    assert found.text.count("all-reduce over tp") == 1 and found.text.count("identity over tp") == 1
    assert "linear up" in found.text and re.search(r"test_page\.py:\d+", found.text)
    assert "batch/dp · - · ffn/tp" in found.text and re.search(r"batch/dp · - · hidden ?, sums over tp", found.text)


class Attends(nn.Module):
    """Blocks of causal attention, and two products of what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(16, 48), "out": nn.Linear(16, 16), "up": nn.Linear(16, 64),
                                                   "down": nn.Linear(64, 16)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in layer["qkv"](x).chunk(3, -1))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + layer["out"](mixed)
            x = x + layer["down"](torch.relu(layer["up"](x)))
        return x.square().mean()


def test_what_is_gathered_and_what_goes_round_is_drawn():
    report = fxpar.inspect(Attends(), "dp=2,cp=2,tp=2", (torch.empty(4, 16, 16),))
    found = Page(page(report))
    assert "batch/dp · seq/cp/tp · hidden" in found.text and "batch/dp · seq/cp · hidden" in found.text
    assert re.search(r"batch/dp · seq/cp · hidden ?, sums over tp", found.text)
    said = [a["data-t"] for a in found.of("rect", "bar")]
    sent = next(r for r in report.collectives if r.kind == "ring" and r.phase == "backward")
    back = [t for t in said if t.startswith("keys and values go round over cp for the model: ")]
    assert len(back) >= 4 and any(f": {sent.bytes // sent.count // 2**10} KiB, " in t for t in back)


def test_more_groups_than_colours_and_parts_of_axes_are_told():
    report = fxpar.inspect(Attends(), "dp=16,tp=2", (torch.empty(32, 16, 16),))
    assert len(Page(page(report)).of("g", "cell")) == 32
    mesh = Mesh(("dp0", "dp1"), (2, 4), {"dp": ("dp0", "dp1"), "ep": ("dp1",)})
    assert mesh_words(mesh, 2) == "pp=2 x dp0=2 x dp1=4 (dp: dp0 x dp1; ep: dp1)" and mesh_words(report.mesh) == "dp=16 x tp=2"


def test_a_long_schedule_is_drawn_closer_at_both_ends():
    report = fxpar.inspect(Tower(), "pp=2,microbatches=64", (torch.empty(64, 8, 16),))
    found = Page(page(report))
    assert "The begin of the step, closer" in found.text and "The end of the step, closer" in found.text
    assert "closer; numbers" not in Page(page(fxpar.inspect(Tower(), "pp=2,microbatches=4", (torch.empty(64, 8, 16),)))).text


@pytest.mark.parametrize("layout, said", [
    ("[heads8/tp heads4 head_dim64, hidden512/dp hidden8]", "[heads x head_dim/tp, hidden/dp]"),
    ("[experts8/dp1, ab2 ffn1792/dp0 hidden8, -]", "[experts/dp1, ffn/dp0, -]"),
    ("[axm2/tp]", "[-/tp]"), ("", ""),
])
def test_layouts_are_in_words(layout, said):
    assert layout_words(layout) == said


def test_numbers_of_parameters_are_in_words():
    assert [many(n) for n in (4096, 131_072_000, 68_452_352_000)] == ["4,096", "131.1 million", "68.45 billion"]


def test_a_model_without_layers_or_communication_has_a_page_too(tmp_path):
    report = fxpar.inspect(torch.nn.Linear(16, 8), "dp=1", (torch.empty(32, 16),))
    text = report.save_html(tmp_path / "report.html").read_text()
    assert "Nothing is communicated." in Page(text).text and "no block of it is drawn" in text


def test_names_of_the_model_are_text(tmp_path):
    model = torch.nn.ModuleDict({"<script>alert(1)</script>\ud800": torch.nn.Linear(4, 4)})
    model.forward = lambda x: next(iter(model.values()))(x).sum()
    text = fxpar.inspect(model, "dp=2", (torch.empty(4, 4),)).save_html(tmp_path / "report.html").read_text()
    assert "<script>alert" not in text and text.count("<script>") == 1


def test_a_peak_that_cannot_be_predicted_hides_nothing(reports):
    def refuse():
        raise RuntimeError("no <graph>")

    text = page(dataclasses.replace(reports["sharded"], predicted=refuse))
    assert "not predicted (RuntimeError: no &lt;graph&gt;)" in text and 'id="block"' in text


def test_a_page_that_cannot_be_written_is_an_error(reports, tmp_path):
    with pytest.raises(FxparError, match="no report in"):
        reports["alone"].save_html(tmp_path / "nowhere" / "report.html")


@pytest.mark.parametrize("part, fits", [(2.0, "fits: "), (0.1, "does not fit: ")])
def test_whether_the_plan_fits_stands_in_every_form(reports, part, fits):
    from rich.console import Console

    report = reports["alone"]
    made = dataclasses.replace(report, limit=int(part * report.peak.bytes), peak_of=lambda _: report.peak.bytes)
    console = Console(width=400, record=True, file=open(os.devnull, "w"))
    console.print(made)
    for text in (str(made), console.export_text(), page(made)):
        assert str(made.verdict) in text and str(made.verdict).startswith(fits)
    told = made.to_dict()["verdict"]
    assert (told["memory"], told["fits"]) == (made.limit, made.verdict.fits) and len(told["ways"]) == len(made.verdict.ways)
    assert report.to_dict()["verdict"] is None


# ---- the same numbers as data and totals ----


def test_a_report_as_json(reports):
    for report in reports.values():
        made = json.loads(report.to_json())
        assert made == json.loads(json.dumps(report.to_dict())) and made["plan"] == str(report.plan)
        assert made["peak"]["bytes"] == report.peak.bytes and made["flops"] == report.flops
        assert [p["name"] for p in made["parameters"]] == [p.name for p in report.parameters]
        assert sum(c["bytes"] for c in made["collectives"]) == sum(c.bytes for c in report.collectives)
    assert json.loads(reports["pipeline"].to_json())["pipeline"]["schedule"] == "interleaved1f1b"


def test_totals_are_sums_of_the_rows(reports):
    made = reports["sharded"]
    assert {t.name for t in made.totals()} == {"zero", "tp", "dp"} and {t.name for t in made.totals("axes")} == {"dp", "tp"}
    for by in ("strategy", "axes"):
        assert sum(t.bytes for t in made.totals(by)) == sum(r.bytes for r in made.collectives)
        assert sum(t.count for t in made.totals(by)) == sum(r.count for r in made.collectives)
    piped = reports["pipeline"]
    messages = next(t for t in piped.totals() if t.name == "pp")
    assert messages.bytes == sum(s.crossing for s in piped.pipeline.stages)  # both ranks take part in all of them
    assert messages.count == 4 * 2 * 3
    with pytest.raises(fxpar.PlanError, match="must be one of strategy, axes"):
        made.totals("rank")


def test_backward_gathers_of_zero_3_are_listed(reports):
    made = reports["sharded"]
    rows = {(r.where.rpartition(".")[2], r.phase): r for r in made.collectives if r.kind == "all_gather" and r.strategy == "zero"}
    assert rows["down", "backward"].count == 4 and rows["down", "forward"].count == 8  # of the bias only the forward has need
    assert rows["down", "backward"].bytes == 4 * 16 * 32 * 4
    assert ("head", "forward") in rows and ("head", "backward") not in rows  # behind the last block: it is kept


def test_rich_shows_the_same_in_tables(reports):
    from rich.console import Console

    console = Console(width=160, record=True, file=open(os.devnull, "w"))
    console.print(reports["pipeline"])
    text = console.export_text()
    assert "Stages" in text and "layers.*.down.weight  x4" in text and "All of a rank's, for" in text and "MFU" in text


# ---- in a browser ----


def chromium() -> str:
    """Raises: `AssertionError` where there is none."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    assert found, "no Chromium: install one, or name it in the variable CHROMIUM"
    return found


PROBE = """<script>addEventListener("error", e => document.body.dataset.failed = e.message);</script>"""
ASK = """<script>addEventListener("load", () => {
  document.querySelector("button.axis").click();
  const bar = document.querySelector(".bar"), box = bar.getBoundingClientRect();
  bar.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: box.x, clientY: box.y}));
  document.querySelector("details:not([open]) summary").click();
  document.body.dataset.answer = JSON.stringify({
    pressed: [...document.querySelectorAll("button.axis")].map(b => b.getAttribute("aria-pressed")),
    groups: [...document.querySelectorAll("button.axis")].map(b => (b.click(), cells.length / b.dataset.count)),
    colours: [...document.querySelectorAll("button.axis")].map(b => (b.click(),
      new Set([...document.querySelectorAll(".cell rect")].map(r => getComputedStyle(r).fill)).size)),
    picked: (cells[0].dispatchEvent(new PointerEvent("pointerenter")), document.querySelectorAll("svg.picked .peer").length),
    tip: getComputedStyle(document.getElementById("tip")).display + document.getElementById("tip").textContent,
    open: document.querySelectorAll("details[open]").length,
    wide: document.documentElement.scrollWidth - innerWidth,
    empty: [...document.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().height < 4).length,
  });
});</script>"""


@pytest.mark.browser
@pytest.mark.parametrize("name", ["sharded", "pipeline", "many"])
def test_in_a_browser(pages, tmp_path, name):
    file, shot = tmp_path / "report.html", tmp_path / "report.png"
    text = page(fxpar.inspect(Attends(), "tp=2,dp=16", (torch.empty(32, 16, 16),))) if name == "many" else pages[name]
    file.write_text(text.replace("<head>", "<head>" + PROBE).replace("</body>", ASK + "</body>"))
    command = [chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,3000",
               "--virtual-time-budget=4000", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120)
    body = next(a for a in Page(done.stdout).of("body"))
    assert "data-failed" not in body
    made = json.loads(body["data-answer"])
    assert made["pressed"][0] == "true" and made["pressed"].count("true") == 1
    assert max(made["groups"]) == {"many": 16}.get(name, 2)
    assert made["colours"] == made["groups"] and made["picked"] == 2  # of the last axis, each rank and its partner
    assert made["tip"].startswith("block") and len(made["tip"]) > 10 and made["wide"] <= 0 and made["empty"] == 0
    subprocess.run([*command, f"--screenshot={shot}", file.as_uri()], capture_output=True, timeout=120, check=True)
    assert shot.stat().st_size > 50_000
