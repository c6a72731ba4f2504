"""The published recipes on CIFAR-10: trained, attacked, and set beside the published figures.

    python benchmarks/cifar10.py --data-dir D --write docs/results --minutes 9

For each ε and method: ``python -m bilevel_at.run`` with the recipe of the paper; clean and PGD-50-10 accuracy on all
10,000 test images; AutoAttack on the first 1,000, of the last epoch (the papers stop there). One results file a run,
and a table of them all. Whatever is done already is not repeated, and a run that was interrupted or killed goes on
(training from the last whole epoch, attacks from batches of the last seconds), so the same command may be given until
it says that it is done; its exit status is 3 where ``--minutes`` were up. On a CPU, ``--methods fastat --epsilons 8/255
--examples 200 --test-examples 20 --autoattack 5 --epochs 1 --model small_cnn`` shows that it works.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pieces import in_pieces
from rich.console import Console

import bilevel_at
from bilevel_at import run as main_job
from bilevel_at.commands import flags
from bilevel_at.commands.device import resolve_device
from bilevel_at.data import ImageSet, load_data
from bilevel_at.errors import InputError
from bilevel_at.evaluate import attack_from_name
from bilevel_at.runs.directory import RunDir
from bilevel_at.runs.evaluations import Store
from bilevel_at.runs.provenance import device_name

METHODS = {
    "fastbat": ["problems/fastbat.py"],
    "fastat": ["problems/fastat.py"],
    "gradalign": ["problems/gradalign.py"],
    "pgd-2": ["problems/minmax.py", "--steps", "2"],  # and its step is half of ε
    "atas": ["problems/atas.py"],
}
# Clean, PGD-50-10 and AutoAttack accuracy in %, with the standard deviation where there is one, and the source.
PUBLISHED = {
    ("fastbat", 8): ("79.97 ± 0.12", "48.83 ± 0.17", "45.19 ± 0.12", "Fast-BAT poster"),
    ("fastat", 8): ("82.39 ± 0.14", "45.49 ± 0.21", "41.87 ± 0.15", "Fast-BAT poster"),
    ("gradalign", 8): ("79.71 ± 0.24", "47.27 ± 0.22", "43.24 ± 0.27", "Fast-BAT poster"),
    ("pgd-2", 8): ("83.26 ± 0.28", "44.71 ± 0.42", "41.73 ± 0.20", "Fast-BAT preprint, Table 2"),
    ("atas", 8): ("81.22", "48.18 (PGD-50)", "45.38", "ATAS, Table I"),
    ("fastbat", 16): ("68.16 ± 0.25", "27.69 ± 0.16", "18.79 ± 0.24", "Fast-BAT poster"),
    ("fastat", 16): ("44.15 ± 7.27", "21.83 ± 1.32", "12.49 ± 0.33", "Fast-BAT poster"),
    ("gradalign", 16): ("58.29 ± 1.32", "26.01 ± 0.16", "17.97 ± 0.33", "Fast-BAT poster"),
}


def command_of(method: str, epsilon: float, seed: int, settings: Sequence[str], out: Path) -> list[str]:
    """The main job's command."""
    command = [*METHODS[method], "--data", "cifar10", "--epsilon", f"{epsilon!r}", "--seed", str(seed), *settings]
    if method == "pgd-2":
        command += ["--step", f"{epsilon / 2!r}"]
    return [*command, "--attacks", "clean", "pgd-50-10", "--out", str(out)]


def is_done(path: Path, job: Sequence[str], strongest: int) -> bool:
    """Whether the record of this command is there, with AutoAttack on so many images."""
    if not path.exists():
        return False
    record = json.loads(path.read_text())
    attacked = record["results"]["last"].get("autoattack", {"n": 0})["n"]
    return record["command"][1:] == list(job) and attacked == strongest


def one(
    method: str, epsilon: float, seed: int, job: Sequence[str], out: Path, test: ImageSet, strongest: int
) -> dict[str, Any]:
    """Train and evaluate; the record of the run."""
    resume = ["--resume"] if (out / "config.json").exists() else []
    main_job.run([*job, *resume])
    run = RunDir(out)
    results = run.read_json("results.json")
    if strongest:
        model, first = bilevel_at.load(out, "last").to(test.device), test[slice(0, strongest)]
        store = Store(run, "last", model, first, usual=epsilon, batch_size=500)
        store.score(attack_from_name("autoattack", epsilon))  # goes on where it was cut off
        results = run.read_json("results.json")
    config, metrics = run.read_json("config.json"), run.metrics()
    return {
        "method": method,
        "epsilon": epsilon,
        "seed": seed,
        "command": config["command"],
        "date": config["date"],
        "device": config["machine"]["device"],
        "versions": config["versions"],
        "recipe": {**config["options"], "problem": config["problem"], "solver": config["solver"]},
        "results": results,
        "training_seconds_per_epoch": statistics.median(m["train_seconds"] for m in metrics),
        "seconds_per_epoch_with_held_out": statistics.median(m["seconds"] for m in metrics),
        "training_peak_memory_GiB": max(m["memory"] for m in metrics),
        "held_out": [{k: m[k] for k in ("epoch", "train", "clean", "robust", "loss")} for m in metrics],
    }


def cell(result: dict[str, Any] | None) -> str:
    return (
        "–"
        if result is None
        else f"{100 * result['accuracy']:.2f}" + (f" (n = {result['n']:,})" if result["n"] != 10_000 else "")
    )


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records beside the published figures, in markdown."""
    lines = [
        "# The published recipes on CIFAR-10",
        "",
        "`python benchmarks/cifar10.py --data-dir D --write docs/results`; accuracy in % of the last epoch, published "
        "figures in brackets. Each row has its own file beside this page, with recipe, versions and every epoch.",
        "",
        "| method | ε | seed | clean | PGD-50-10 | AutoAttack | s/epoch | device, date | published in |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(records, key=lambda r: (r["epsilon"], list(METHODS).index(r["method"]), r["seed"], r["device"])):
        radius, last = round(255 * r["epsilon"]), r["results"]["last"]
        known = PUBLISHED.get((r["method"], radius), ("–", "–", "–", "–"))
        names = ("clean", "pgd-50-10", "autoattack")
        cells = [f"{cell(last.get(name))} [{known[i]}]" for i, name in enumerate(names)]
        lines.append(
            f"| {r['method']} | {radius}/255 | {r['seed']} | {' | '.join(cells)} | "
            f"{r['training_seconds_per_epoch']:.1f} | {r['device']}, {r['date']} | {known[3]} |"
        )
    return "\n".join(lines) + "\n"


def benchmark(
    data_dir: str = "data",
    methods: tuple[str, ...] = tuple(METHODS),
    epsilons: tuple[float, ...] = (8 / 255, 16 / 255),
    seeds: int = 1,
    model: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    examples: int | None = None,
    test_examples: int | None = None,
    autoattack: int = 1000,
    precision: str = "float32",
    compile: bool = False,
    memory_format: str = "auto",
    device: str = "auto",
    folder: str = "runs/bench-cifar10",
    minutes: float | None = None,
    write: str | None = None,
) -> int:
    """Train and evaluate the published recipes.

    Args:
        data_dir: where CIFAR-10 lies.
        methods: which of fastbat, fastat, gradalign, pgd-2, atas.
        epsilons: radii.
        seeds: seeds 0 … seeds − 1.
        model: instead of the recipe's.
        epochs: instead of the recipe's.
        batch_size: instead of the recipe's.
        examples: train on this many only.
        test_examples: evaluate on this many only.
        autoattack: test images that AutoAttack gets, the first so many; 0 for none.
        precision: float32 or bfloat16.
        compile: compile each step, as for bilevel_at.run.
        memory_format: auto, contiguous or channels_last, as for bilevel_at.run.
        device: cpu, cuda, or auto.
        folder: where the runs go.
        minutes: stop after so many, to go on with the same command.
        write: a folder for the results files and the table; the runs' folder if not given.
    """
    for flag, value, least in (("seeds", seeds, 1), ("autoattack", autoattack, 0), ("test-examples", test_examples, 1)):
        if value is not None and value < least:
            raise InputError(f"--{flag} is {value}; it must be at least {least}")
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise InputError(f"--methods {unknown[0]} is not known; choose from {', '.join(METHODS)}")
    place = resolve_device(device)
    _, test = load_data("cifar10", data_dir)
    if test_examples is not None:
        test = test[slice(0, test_examples)]
    test = test.to(place)
    given = {
        "data-dir": data_dir,
        "model": model,
        "epochs": epochs,
        "batch-size": batch_size,
        "examples": examples,
        "test-examples": test_examples,
        "precision": precision,
        "memory-format": memory_format,
        "device": device,
    }
    settings = [text for k, v in given.items() if v is not None for text in (f"--{k}", str(v))]
    settings += ["--compile"] if compile else []
    target, console = Path(write or folder), Console()
    target.mkdir(parents=True, exist_ok=True)

    def page() -> None:
        (target / "cifar10.md").write_text(table([json.loads(f.read_text()) for f in target.glob("cifar10-*.json")]))

    def work() -> None:
        for epsilon in epsilons:
            for method in methods:
                for seed in range(seeds):
                    stem, strongest = f"{method}-eps{round(255 * epsilon)}-seed{seed}", min(autoattack, len(test))
                    job = command_of(method, epsilon, seed, settings, Path(folder) / stem)
                    name = f"cifar10-{stem}-{device_name(place).replace(' ', '-')}.json"
                    if is_done(target / name, job, strongest):
                        continue
                    record = one(method, epsilon, seed, job, Path(folder) / stem, test, strongest)
                    RunDir(target).write_json(name, record)
                    console.print(f"written to {target / name}", highlight=False)
                    page()
        page()
        console.print(f"done: {target / 'cifar10.md'}", highlight=False)

    return in_pieces(work, minutes)


def command(args: Sequence[str]) -> int:
    return benchmark(
        **flags.parse(
            flags.flags_of(benchmark), args, "python benchmarks/cifar10.py", "Train and evaluate the published recipes."
        )
    )


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/cifar10.py"))
