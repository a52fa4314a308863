"""What docs/support.md says of the families of transformers: ``python -m tests.support`` tries them all and writes it.

Its part of the file lies between two comments; what stands around them is left as it is. With names
(``python -m tests.support causal/llama image/vit``) it prints their lines and writes nothing.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from fxpar.errors import EquivalenceError, FxparError
from fxpar.testing import assert_equivalent
from tests.zoo import families

FILE = Path(__file__).parent.parent / "docs" / "support.md"
BEGIN, END = "<!-- written by python -m tests.support -->", "<!-- end of what python -m tests.support writes -->"
PLAN = "dp=2,tp=2"
RIGHT, NOT_TRIED = "right", "not tried"
SECONDS = 300
"""For one family: what takes longer hangs."""

HEADINGS = {
    "causal": "Causal language models",
    "masked": "Masked language models",
    "sequence-to-sequence": "Sequence to sequence",
    "image": "Images (classification)",
    "sound": "Sound (classification)",
    "ctc": "Sound (connectionist temporal classification)",
    "speech-to-text": "Speech to text",
}


def outcome(name: str) -> str:
    """What becomes of a family under `PLAN`: "right", "refused: why", or "not tried" where it could not be shrunk.

    What is refused is tried once more without what its config drops or masks at random: "right with drop_path_rate at 0".
    Raises: what is none of them; `TimeoutError`.
    """
    with warnings.catch_warnings(), _limit(SECONDS):
        warnings.simplefilter("ignore")
        try:
            model, _ = families.build(name)
        except families.NotShrunk:
            return NOT_TRIED
        refused = _compare(name, calm=False)
        if refused is None:
            return RIGHT
        off = families.random_fields(model.config)
        if off and _compare(name, calm=True) is None:
            return f"right with {', '.join(f'`{field}`' for field in off)} at 0, by default refused: {refused}"
        return f"refused: {refused}"


def _compare(name: str, calm: bool) -> str | None:
    """None, or why it is refused. In float64 where rounding alone is more than what `assert_equivalent` allows in float32."""
    try:
        model, inputs = families.build(name, calm)
        try:
            assert_equivalent(model, PLAN, inputs)
        except EquivalenceError:
            model, inputs = families.build(name, calm)
            inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
            assert_equivalent(model.double(), PLAN, inputs)
    except EquivalenceError:
        raise
    except FxparError as error:
        return _reason(error)
    return None


def _reason(error: FxparError) -> str:
    """What is wrong and in which function of which file, without the lines and folders that differ between machines."""
    found = re.search(r"([^/\\]+\.py):\d+(?: in |\s+)(.*)", getattr(error, "where", None) or "")
    place = f" ({found[1]}, `{found[2].strip()}`)" if found else ""
    return f"{getattr(error, 'what', error)}{place}".replace("|", "\\|").replace("\n", " ")


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def committed() -> dict[str, str]:
    """Family -> outcome, as the file has it."""
    found: dict[str, str] = {}
    task = ""
    by_heading = {heading: task for task, heading in HEADINGS.items()}
    for line in _part(FILE.read_text()).splitlines():
        if line.startswith("### "):
            task = by_heading[line.removeprefix("### ")]
        elif line.startswith("| `"):
            kind, _, result = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:4])
            found[f"{task}/{kind.strip('`')}"] = result
        elif line.startswith("Not tried: "):
            found.update({f"{task}/{kind}": NOT_TRIED for kind in re.findall(r"`([^`]+)`", line)})
    return found


def _part(text: str) -> str:
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


def table(outcomes: dict[str, str]) -> str:
    """The part of the file."""
    tried = [o for o in outcomes.values() if o != NOT_TRIED]
    refused = sum(o.startswith("refused") for o in tried)
    lines = ["", f"{len(tried) - refused} of {len(tried)} families are right, {refused} are refused."]
    for task, heading in HEADINGS.items():
        mine = {n.partition("/")[2]: o for n, o in outcomes.items() if n.startswith(f"{task}/")}
        lines += ["", f"### {heading}", "", "| family | model | |", "|---|---|---|"]
        lines += [f"| `{kind}` | {families.FAMILIES[f'{task}/{kind}'][1]} | {o} |" for kind, o in mine.items() if o != NOT_TRIED]
        left = ", ".join(f"`{kind}`" for kind, o in mine.items() if o == NOT_TRIED)
        lines += ["", f"Not tried: {left}."] if left else []
    return "\n".join([*lines, ""])


def write(outcomes: dict[str, str]) -> None:
    text = FILE.read_text()
    FILE.write_text(text[: text.index(BEGIN) + len(BEGIN)] + table(outcomes) + text[text.index(END) :])


def main(names: list[str]) -> None:
    outcomes = {}
    for name in names or families.FAMILIES:
        outcomes[name] = outcome(name)
        print(f"{name}: {outcomes[name]}", flush=True)
    if not names:
        write(outcomes)


if __name__ == "__main__":
    main(sys.argv[1:])
