"""What it takes to train a large model on a whole cluster: memory, communication, bubble, time of a step and MFU, predicted.

    python examples/production/run.py llama3_70b        one configuration: its report, and what is published of it
    python examples/production/run.py llama3_70b --html report.html     and as a page for a browser
    python examples/production/run.py --table           one line for each configuration, as a table in Markdown
    python examples/production/run.py --suggest llama3_70b    the plans that `fxpar.suggest` prefers, and its own beside the best

A configuration is a file beside this one: a model of transformers, a plan, the batch of a step, the cluster. The model is on the
meta device, with shapes and without weights; no GPU, no other process and no download is needed, and two cores are enough.
"""

import argparse
import pathlib
import time
import tomllib

import torch
import transformers

import fxpar

FOLDER = pathlib.Path(__file__).parent
NAMES = tuple(sorted(file.stem for file in FOLDER.glob("*.toml")))
LIMIT = 300
"""Seconds of a processor that one configuration may take."""


def read(name):
    """A configuration, by the name of its file."""
    return tomllib.loads((FOLDER / f"{name}.toml").read_text())


def model_of(config):
    """The model, on the meta device."""
    model_class = getattr(transformers, config["model"])
    with torch.device("meta"):
        return model_class(model_class.config_class(**config["config"], use_cache=False))


def report_of(config):
    """The report of a configuration on all of its ranks."""
    tokens = torch.zeros(config["batch"], config["sequence"], dtype=torch.long, device="meta")
    report = fxpar.inspect(model_of(config), config["plan"], dict(input_ids=tokens, labels=tokens))
    report.step.cluster = config["cluster"]
    return report


def suggestions_of(config):
    """What `fxpar.suggest` finds for the GPUs of a configuration, and its plan beside it."""
    tokens = torch.zeros(config["batch"], config["sequence"], dtype=torch.long, device="meta")
    gpus = fxpar.Plan.parse(config["plan"]).world_size
    return fxpar.suggest(model_of(config), dict(input_ids=tokens, labels=tokens), gpus=gpus, cluster=config["cluster"],
                         compare=[config["plan"]])


def parameters(report):
    """How many numbers the model has, and how many are on the rank that stores most."""
    whole = {p.name: torch.Size(p.shape).numel() for p in report.parameters}
    return sum(whole.values()), report.memory["parameters"] // 4


def per_axis(report, least=0.05):
    """GiB that the collectives of one step leave on a rank, on the pipeline rank that has most, for each group of axes; those of
    `least` and more."""
    owner = report.pipeline.schedule.owner if report.pipeline else None
    found = {}
    for row in report.collectives:
        of_ranks = found.setdefault("+".join(row.axes), {})
        rank = owner[row.stage] if owner else 0
        of_ranks[rank] = of_ranks.get(rank, 0) + row.bytes
    most = {axes: max(of_ranks.values()) / 2**30 for axes, of_ranks in found.items()}
    return {axes: size for axes, size in most.items() if size >= least}


def tokens_per_second(config, report):
    """Of one GPU."""
    return config["batch"] * config["sequence"] / report.step.time().seconds / report.plan.world_size


def summary(config, report):
    """What the report says, in a few lines, and what is published."""
    made, (whole, mine) = report.step.time(), parameters(report)
    flops = made.flops / made.seconds / report.plan.world_size
    lines = [
        f"{config['title']} on {report.plan.world_size} GPUs of {made.cluster.name}: {report.plan}",
        f"parameters: {whole / 1e9:.2f} billion; stored by a rank {mine / 1e9:.3f} billion",
        f"peak memory of a rank: {report.peak_memory / 2**30:.1f} of {made.cluster.memory / 2**30:.1f} GiB",
        "collectives of a step, GiB on a rank: " + ", ".join(f"{a} {size:.1f}" for a, size in per_axis(report).items()),
        f"bubble {made.timeline.bubble:.1%}; step {made.seconds:.2f} s; {tokens_per_second(config, report):,.0f} tokens/s, "
        f"{flops / 1e12:.0f} TFLOP/s a GPU; MFU {made.utilization:.1%}",
    ]
    if published := config.get("published"):
        lines.append("published: " + ", ".join([
            *([f"{published['tokens']:,} tokens/s"] if "tokens" in published else []),
            f"{published['tflops']} TFLOP/s a GPU, {published['tflops'] / published['peak']:.1%} of the peak",
            published["how"], published["source"]]))
    return lines


HEAD = ("model", "GPUs", "plan", "parameters a rank, M", "peak GiB a rank", "GiB of collectives a rank and step", "bubble",
        "step s", "tokens/s/GPU", "MFU", "published tokens/s/GPU", "published MFU", "CPU s")


def row(config, report, seconds):
    """A line of the table."""
    made, published = report.step.time(), config.get("published", {})
    return (config["title"], str(report.plan.world_size), f"`{report.plan}`", f"{parameters(report)[1] / 1e6:,.0f}",
            f"{report.peak_memory / 2**30:.1f}", ", ".join(f"{a} {size:.1f}" for a, size in per_axis(report).items()),
            f"{made.timeline.bubble:.1%}", f"{made.seconds:.2f}", f"{tokens_per_second(config, report):,.0f}",
            f"{made.utilization:.1%}", f"{published['tokens']:,}" if "tokens" in published else "",
            f"{published['tflops'] / published['peak']:.1%}" if published else "", f"{seconds:.0f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--table", action="store_true", help="one line for each configuration, and no reports")
    parser.add_argument("--suggest", action="store_true", help="which plan would be better, and why")
    parser.add_argument("--html", metavar="FILE.html", help="write the report of one configuration as a page, too")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in NAMES]:
        parser.error(f"there is no {unknown[0]}: {', '.join(NAMES)}")
    if args.html and len(args.names) != 1:
        parser.error("--html is for one configuration")
    if not args.names and not args.table and not args.suggest:
        parser.error("name a configuration, or ask for the --table of all, or to --suggest for all")
    if args.suggest:
        for name in args.names or NAMES:
            print(read(name)["title"], suggestions_of(read(name)), sep="\n", end="\n\n", flush=True)
        return
    if args.table:
        print("\n".join(" | ".join(("", *cells, "")).strip() for cells in (HEAD, ["---"] * len(HEAD))))
    for name in args.names or NAMES:
        config, start, used = read(name), time.perf_counter(), time.process_time()
        report = report_of(config)
        lines = summary(config, report) if args.table else [str(report), "", *summary(config, report)]
        if args.html:
            report.save_html(args.html)
        took, used = time.perf_counter() - start, time.process_time() - used
        if args.table:
            print(" | ".join(("", *row(config, report, used), "")).strip(), flush=True)
        else:
            print("\n".join(lines))
            print(f"this took {took:.0f} s, {used:.0f} s of a processor" + (
                f": more than the {LIMIT} s that it may" if used > LIMIT else ""))


if __name__ == "__main__":
    main()
