"""The table of test_gpu.py's cases: ``python -m tests.gpu_table FILE`` reads the lines that it collected.

A row is an architecture, a column a mesh; a cell says how many cases (of recomputation, dtypes and microbatches) were right.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown of lines as `tests.gpu_program` prints them, with their mesh."""
    meshes = list(dict.fromkeys(line["mesh"] for line in lines))
    rows = [f"| architecture | {' | '.join(f'`{m}`' for m in meshes)} |", "|---" * (len(meshes) + 1) + "|"]
    for name in sorted({line["model"] for line in lines}):
        cells = [_cell([x for x in lines if (x["model"], x["mesh"]) == (name, mesh)]) for mesh in meshes]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(cases: list[dict[str, Any]]) -> str:
    right = sum(not case["error"] for case in cases)
    return f"{right}" if right == len(cases) else f"**{right} of {len(cases)}**"


if __name__ == "__main__":
    print(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
