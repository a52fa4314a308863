"""``python -m fxpar``: what a plan does to a model, and whether it computes the same, from the shell.

MODEL is ``module:callable`` (a function or class that returns the module, or ``(module, example_inputs)``), a Hugging Face
class with a configuration (``LlamaForCausalLM:config.json``), or a directory that has a ``config.json``.
"""

from __future__ import annotations

import argparse
import importlib
import inspect as python_inspect
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import rich
import torch
from torch import nn

import fxpar
from fxpar.choose.suggest import CANDIDATES, DEFAULT, suggest
from fxpar.cost.clusters import cluster, clusters
from fxpar.cost.formulas import explained
from fxpar.errors import FxparError, PlanError, brief
from fxpar.pipeline import drawing
from fxpar.plan import SUFFIXES, Plan
from fxpar.progress import be_quiet, stage
from fxpar.report.data import known_verdict
from fxpar.report.report import Report, inspect
from fxpar.report.step import CLUSTER
from fxpar.verify.equivalence import assert_equivalent
from fxpar.verify.simulation import BACKENDS


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 on success, 1 where a check failed or no plan fits, 2 for a mistake in the arguments."""
    args = _parser().parse_args(argv)
    be_quiet(args.quiet or None)
    try:
        if args.command == "suggest":
            return _suggest(args)
        plan = _plan(args)
        if args.command == "plan":
            print(f"{plan}   world size {plan.world_size}")
            plan.require_supported()
            return 0
        if args.command == "inspect":
            _check_pipeline(args, plan)
        model, example = load_model(args.model, meta=args.command == "inspect",
                                    batch=args.batch or 2 * plan.dp * plan.microbatches, seq=args.seq)
        if args.command == "inspect":
            return _inspect(args, inspect(model, plan, example, memory=args.memory, cluster=args.cluster))
        else:
            model.train(not args.eval)
            assert_equivalent(model, plan, example, lowered=not args.partitioned, backend=args.backend)
            print(f"equal: {args.model} under {plan} computes what one device computes")
        return 0
    except AssertionError as error:
        print(f"differs: {error}", file=sys.stderr)
        return 1
    except FxparError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _plan(args: argparse.Namespace) -> Plan:
    """The plan that is given as text, as a file, or in Megatron's flags."""
    if args.command == "plan" and args.megatron is not None:
        if args.plan is not None:
            raise PlanError("plan", args.plan, "must not be given with --megatron, which says all of it")
        return Plan.from_megatron(args.megatron, args.world_size)
    if args.plan is None:
        raise PlanError("plan", None, "must be given, or --megatron", "dp=2,tp=2")
    return Plan.load(args.plan) if Path(args.plan).suffix in SUFFIXES else Plan.parse(args.plan)


def _check_pipeline(args: argparse.Namespace, plan: Plan) -> None:
    """Refuse what is about pipelines, where there is none, and what does not exist."""
    if args.timeline and plan.pp == 1:
        raise PlanError("pp", 1, "must be 2 or more for --timeline: there is no pipeline whose step could be drawn", "pp=2")
    cluster(args.cluster or CLUSTER)


def _suggest(args: argparse.Namespace) -> int:
    """Print which plan to take; 1 where none fits."""
    model, example = load_model(args.model, meta=True, batch=args.batch, seq=args.seq)
    found = suggest(model, example, gpus=args.gpus, memory=args.memory, cluster=args.cluster or CLUSTER, fixed=args.fixed,
                    compare=args.compare, candidates=args.candidates)
    print(found)
    if args.formulas:
        print("\nformulas, for plans without a pipeline, then under 1f1b:", explained(""), explained("1f1b"), sep="\n")
    return 0 if found.best is not None else 1


def _inspect(args: argparse.Namespace, report: Report) -> int:
    """Print a report; draw its timeline where that is asked for. 1 where the plan does not fit into the memory that was
    named, or nobody can tell."""
    if args.html:
        print(f"written: {report.save_html(args.html)}", file=sys.stderr)
    if args.json:
        print(report.to_json())
    elif sys.stdout.isatty():
        rich.print(report)
    else:
        print(report)
    verdict = known_verdict(report)
    code = int(report.limit is not None and (verdict is None or not verdict.fits))
    if report.pipeline is None or not args.timeline:
        return code
    made, kept = report.pipeline.timeline(), report.pipeline.activations()
    print(f"\n{drawing.text(made, kept=kept)}")
    try:
        Path(args.timeline).write_text(drawing.svg(made, kept=kept))
    except OSError as error:
        raise FxparError(f"no timeline in {args.timeline}: {error}") from error
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fxpar", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"fxpar {fxpar.__version__}, torch {torch.__version__}")
    parser.add_argument("--quiet", action="store_true", help="say nothing while something takes long")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("inspect", "layouts, collectives, memory and FLOPs; no processes, no weights"),
                       ("check", "run every rank in this process and compare with one device")):
        command = commands.add_parser(name, help=text)
        command.add_argument("model", metavar="MODEL")
        command.add_argument("--plan", required=True, help="for example dp=2,tp=2, or a .toml or .yaml file")
        command.add_argument("--batch", type=_positive, help="global batch (Hugging Face models); default: 2 x dp x microbatches")
        command.add_argument("--seq", type=_positive, default=128, help="sequence length (Hugging Face models)")
        command.add_argument("--eval", action="store_true", help="check the model in eval mode")
    look = commands.choices["inspect"]
    look.add_argument("--timeline", metavar="FILE.svg", help="draw a step of the pipeline there, and print it as text")
    look.add_argument("--html", metavar="FILE.html", help="write the report as a page for a browser, too")
    look.add_argument("--json", action="store_true", help="print the report as JSON")
    look.add_argument("--cluster", help=f"what times are for: {', '.join(clusters())}, or a .toml file of "
                                        f"the same form; default: {CLUSTER}")
    look.add_argument("--memory", help="of a device, as 80GiB: exit with 1 where the plan does not fit; default: that of the "
                                       "cluster, if one is named")
    _add_suggest(commands.add_parser("suggest", help="which plan to take for a number of GPUs, and why; no processes"))
    check = commands.choices["check"]
    check.add_argument("--partitioned", action="store_true",
                       help="run the partitioned program, not the graphs that the inductor backend makes of it")
    check.add_argument("--backend", default="eager", choices=BACKENDS, help="inductor: compile those graphs, too")
    plan = commands.add_parser("plan", help="parse and validate a plan; translate Megatron's flags into one")
    plan.add_argument("plan", metavar="PLAN", nargs="?", help="its text, or a .toml or .yaml file")
    plan.add_argument("--megatron", metavar="FLAGS", help="parallelism flags of Megatron Core, in quotes: "
                      "--megatron=\"--tensor-model-parallel-size 4 --bf16\"")
    plan.add_argument("--world-size", type=_positive, help="number of ranks, from which dp follows (with --megatron)")
    return parser


def _add_suggest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--gpus", type=_positive, required=True)
    parser.add_argument("--memory", help="of a GPU, as 80GiB; default: the cluster's")
    parser.add_argument("--cluster", help=f"{', '.join(clusters())}, or a .toml file of the same form; default: {CLUSTER}")
    parser.add_argument("--batch", type=_positive, default=64, help="global batch of a step (Hugging Face models)")
    parser.add_argument("--seq", type=_positive, default=4096, help="sequence length (Hugging Face models)")
    parser.add_argument("--fixed", default=DEFAULT, help=f"what all plans share, as tp=8,param_dtype=bf16; default: {DEFAULT}")
    parser.add_argument("--compare", action="append", default=[], metavar="PLAN",
                        help="a plan to tell of beside the best; repeatable")
    parser.add_argument("--candidates", type=_positive, default=CANDIDATES, help="how many plans to partition for real")
    parser.add_argument("--formulas", action="store_true", help="print the formulas that plans are searched by")


def _positive(text: str) -> int:
    number = int(text) if len(text) < 20 else 0
    if not 1 <= number < 2**31:
        raise argparse.ArgumentTypeError(f"must be a positive integer, less than {2**31}")
    return number


def load_model(spec: str, *, meta: bool, batch: int = 8, seq: int = 128) -> tuple[nn.Module, Any]:
    """The model that `spec` names, and example inputs (None if unknown). meta: build it without weights.

    Raises: `FxparError` if there is no such thing.
    """
    with stage(f"making {brief(spec)}"):
        return _load_model(spec, meta, batch, seq)


def _load_model(spec: str, meta: bool, batch: int, seq: int) -> tuple[nn.Module, Any]:
    path = Path(spec)
    if _is_folder(path):
        config = _config(path / "config.json")
        named = config.get("architectures") or ["AutoModel"]
        if not isinstance(named, list) or not isinstance(named[0], str):
            raise FxparError(f"{path / 'config.json'}: architectures must be a list of names of classes, not {brief(named)}")
        return _hugging_face(named[0], config, meta, batch, seq)
    head, _, tail = spec.partition(":")
    if tail.endswith(".json"):
        return _hugging_face(head, _config(Path(tail)), meta, batch, seq)
    if not tail or not head.strip("."):
        raise FxparError(f"MODEL {brief(spec)}: must be module:callable, Class:config.json, or a directory with a config.json")
    sys.path.insert(0, "")
    try:
        build = getattr(importlib.import_module(head), tail)
        made = build() if callable(build) and not isinstance(build, nn.Module) else build
    except Exception as error:
        raise FxparError(f"MODEL {brief(spec)}: {_told(error)}") from error
    model, example = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise FxparError(f"MODEL {brief(spec)}: is no torch.nn.Module and no function that returns one, "
                         f"but a {type(model).__name__}")
    return model, example


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long is none
        return False


def _told(error: Exception) -> str:
    """What an exception of the user's code says, on one line, and the line that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(("<frozen", __file__))]
    said = " ".join(str(error).split())
    said = said if len(said) <= 500 else f"{said[:400]}...{said[-100:]}"
    text = said if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {said}"
    return f"{text} (at {frames[-1].filename}:{frames[-1].lineno})" if frames else text


def _config(path: Path) -> dict[str, Any]:
    try:
        made = json.loads(path.read_text())
        if not isinstance(made, dict):
            raise ValueError(f"it holds a {type(made).__name__}")
        return made
    except (OSError, ValueError, RecursionError) as error:
        raise FxparError(f"no configuration in {brief(str(path))}: {error}") from error


def _hugging_face(name: str, config: dict[str, Any], meta: bool, batch: int, seq: int) -> tuple[nn.Module, Any]:
    import transformers

    cls = getattr(transformers, name, None)
    if cls is None or not isinstance(getattr(cls, "config_class", None), type):
        raise FxparError(f"transformers has no class {brief(name)} of models")
    try:
        made = cls.config_class.from_dict({**config, "use_cache": False})
        torch.manual_seed(0)
        with torch.device("meta" if meta else "cpu"):
            model = cls(made)
        return model, _example(model, made, batch, seq)
    except Exception as error:
        raise FxparError(f"{name} cannot be made from the configuration, or inputs of batch {batch} and sequence length {seq} "
                         f"for it: {_told(error)}") from error


def _example(model: nn.Module, config: Any, batch: int, seq: int) -> Any:
    """Token ids and labels for a language model; what the model itself offers for others."""
    takes = python_inspect.signature(model.forward).parameters
    if "input_ids" not in takes:
        return None
    vocab = getattr(config, "vocab_size", 2)
    tokens = torch.randint(0, vocab, (batch, seq))
    example = {"input_ids": tokens}
    if "labels" in takes and ("CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__
                              or "MaskedLM" in type(model).__name__):
        example["labels"] = tokens.clone()
    return example
