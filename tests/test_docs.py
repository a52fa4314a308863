"""The documentation: every public name is in the reference and says what it takes and raises; its pages are there. What is
installed has what it needs, and needs nothing else."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fxpar
from tests.test_house import files

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PUBLIC = {name: getattr(fxpar, name) for name in fxpar.__all__}
FUNCTIONS = {name: thing for name, thing in PUBLIC.items() if inspect.isfunction(thing)} | {
    "testing.assert_equivalent": fxpar.testing.assert_equivalent}
CLASSES = {name: thing for name, thing in PUBLIC.items() if inspect.isclass(thing)}


def methods() -> Iterator[tuple[str, Any]]:
    """What the public classes define themselves, for users."""
    for name, thing in CLASSES.items():
        for inner, method in vars(thing).items():
            plain = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
            if not inner.startswith("_") and (inspect.isfunction(plain) or isinstance(method, property)):
                yield f"{name}.{inner}", plain


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^::: fxpar\.(\S+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert sorted(listed) == sorted({*PUBLIC} - {"testing"} | {"testing.assert_equivalent"})
    assert {name for name in PUBLIC if name not in (fxpar.__doc__ or "") and name not in CLASSES} <= {"compile_program"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_says_what_it_takes_and_raises(name):
    function = FUNCTIONS[name]
    text = inspect.getdoc(function) or ""
    assert len(text) > 80
    takes = [p for p in inspect.signature(function).parameters if p not in ("args", "kwargs")]
    missing = [p for p in takes if not re.search(rf"\b{p}\b", text)]
    assert not missing, f"{name} does not say what {missing} are"
    assert "Raises" in text , f"{name} does not say what it raises"


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_says_what_it_holds(name):
    text = inspect.getdoc(CLASSES[name]) or ""
    assert len(text) > 40
    if dataclasses.is_dataclass(CLASSES[name]):
        fields = [f.name for f in dataclasses.fields(CLASSES[name]) if not f.name.startswith("_")]
        told = " ".join([text, *(inspect.getdoc(m) or "" for _, m in methods())])
        missing = [f for f in fields if not re.search(rf"\b{f}\b", told)]
        assert not missing, f"{name} does not say what {missing} are"


INHERITED = {"ParallelModule.forward", "ParallelModule.train", "ParallelModule.load_state_dict", "ParallelModule.named_modules"}
"""Methods of `nn.Module`, which PyTorch documents."""


def test_every_method_is_documented_with_its_parameters():
    missing = []
    for name, method in methods():
        text = inspect.getdoc(method) or ""
        takes = [p for p in inspect.signature(method).parameters if p not in ("self", "cls", "args", "kwargs")]
        if name not in INHERITED and (not text or any(not re.search(rf"\b{p}\b", text) for p in takes)):
            missing.append(name)
    assert not missing


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere():
    listed = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    pages = {p.name for p in (ROOT / "docs").glob("*.md")}
    assert listed == pages
    for page in pages:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / "docs" / page).read_text()):
            assert (ROOT / "docs" / link).exists(), f"docs/{page} links to {link}"
            assert not link.startswith("."), f"docs/{page} links to {link}, which is not in the site"


def test_what_the_package_needs_is_what_it_imports():
    needed = {re.match(r"[\w-]+", text)[0] for text in PROJECT["project"]["dependencies"]}
    found: set[str] = set()
    for _, file in files():
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(
                node, ast.ImportFrom) else []
            found |= {name.split(".")[0] for name in names}
    found -= {*sys.stdlib_module_names, "fxpar", "passes", "backends"}
    optional = {"transformers", "accelerate", "peft", "lightning", "lightning_fabric", "yaml", "triton"}
    assert needed <= found, f"nothing imports {needed - found}"
    assert found - needed <= optional, f"pyproject.toml does not have {found - needed - optional}"


def test_the_package_has_its_data():
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for package, patterns in data.items():
        for pattern in patterns:
            assert list((ROOT / package.replace(".", "/")).glob(pattern)), f"{package} has no {pattern}"
    shipped = {file for package, patterns in data.items() for pattern in patterns
               for file in (ROOT / package.replace(".", "/")).glob(pattern)}
    there = [f for folder in ("fxpar", "passes", "backends") for f in (ROOT / folder).rglob("*") if f.is_file()]
    left = {f.as_posix() for f in there if f.suffix not in (".py", ".pyc") and f not in shipped}
    assert not left, f"pyproject.toml does not ship {left}"
    assert PROJECT["project"]["version"] == fxpar.__version__
    manifest = (ROOT / "MANIFEST.in").read_text()
    assert all(f"graft {folder}\n" in manifest for folder in ("docs", "examples", "tests", "benchmarks"))
