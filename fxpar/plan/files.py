"""files: plans in files."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxpar.errors import PlanError


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ValueError("PyYAML, which reads it, is not installed; pip install pyyaml, or write TOML") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


_READERS: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".yaml": _yaml, ".yml": _yaml, ".json": json.loads}
SUFFIXES = tuple(_READERS)
"""How names of files end that hold a plan."""


def fields_of(path: str | os.PathLike) -> dict[str, Any]:
    """The fields in a file: all that it holds, or its table "plan".

    Raises `PlanError` for what cannot be read or is no table.
    """
    file = Path(path)
    if file.suffix not in _READERS:
        raise PlanError("plan", str(path), f"must be a file whose name ends in {', '.join(SUFFIXES)}", "plan.toml")
    try:
        held = _READERS[file.suffix](file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError("plan", str(path), f"cannot be read: {error}") from error
    inner = held.get("plan", held) if isinstance(held, dict) else held
    if not isinstance(inner, dict) or not all(isinstance(name, str) for name in inner):
        raise PlanError("plan", str(path), "must hold the fields of a plan, or a table `plan` with them", "dp = 2")
    return inner
