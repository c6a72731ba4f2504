"""Training on examples of small or of large input gradient norm: the study of ATAS (Huang et al., 2023, section III).

    python benchmarks/gradient_norms.py [--seeds 3] [--write docs/results/gradient-norms.md]

Fast-AT is trained once per seed and each example's input gradient norm averaged over the epochs. New networks are then
trained on parts of the training set, by deciles of that average and at random, for the same number of iterations, with
a small and a large step. The paper's question: do examples of large norm bring catastrophic overfitting about, and does
a large step? ATAS is trained once as well, for its norms and steps by epoch. About ten minutes on two cores.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from pages import at_least_one
from rich.console import Console
from rich.progress import Progress
from scipy.stats import spearmanr
from torch import Tensor

from bilevel_at.commands import flags
from bilevel_at.data import Images, load_data
from bilevel_at.diagnose import Deciles, History, average_gradient_norm, deciles, read_history
from bilevel_at.errors import InputError
from bilevel_at.evaluate import attack_from_name, robust_correct
from bilevel_at.figures.diagnosis import gradient_norms
from bilevel_at.models import build_model
from bilevel_at.runs.problem_file import ProblemFile
from bilevel_at.solvers import ZeroIG
from bilevel_at.train import Recipe, Trainer, catastrophic_overfitting

PARTS: dict[str, tuple[int, int] | float] = {
    "lowest 20 %": (1, 2),
    "lowest 40 %": (1, 4),
    "all": (1, 10),
    "highest 40 %": (7, 10),
    "highest 20 %": (9, 10),
    "random 40 %": 0.4,
    "random 20 %": 0.2,
}
"""Deciles from and to, or the share drawn at random: the same number of examples, to compare with."""
STYLES = {
    "lowest 20 %": ("#1f5fa8", "-", "o"),
    "lowest 40 %": ("#4ea3d9", "--", "s"),
    "all": ("#111111", "-", "^"),
    "highest 40 %": ("#d9a066", "--", "D"),
    "highest 20 %": ("#d9730d", "-", "v"),
    "random 40 %": ("#7a7a7a", ":", None),
    "random 20 %": ("#7a7a7a", "-.", None),
}
LOOKS = 15
ATTACK = "pgd-10-1"


def start(method: str, images: Images, test: Images, setting: dict[str, Any], seed: int, **arguments: Any) -> Trainer:
    torch.set_num_threads(1)
    file = ProblemFile(method)
    torch.manual_seed(seed)
    model = build_model(setting["model"], images.shape, images.classes, images)
    per_epoch = len(range(0, len(images), setting["batch"]))
    # As many iterations as all examples take in so many epochs, whatever the number of examples is.
    epochs = max(1, round(setting["iterations"] / per_epoch))
    recipe = Recipe(epochs=epochs, batch_size=setting["batch"], lr=setting["lr"])
    epsilon = setting["epsilon"]
    problem = file.problem(epsilon=epsilon, **arguments)
    return Trainer(problem, ZeroIG(), model, images, test, recipe, attack_from_name(ATTACK, epsilon), seed)


def data_of(setting: dict[str, Any]) -> tuple[Images, Images]:
    train, test = load_data(setting["data"], setting["data_dir"], download=False)
    if setting["examples"] is not None:
        train, test = train.sample(setting["examples"]), test.sample(setting["examples"])
    assert isinstance(train, Images) and isinstance(test, Images)
    return train, test


def measure(method: str, seed: int, setting: dict[str, Any]) -> dict[str, Any]:
    """Train on everything; every example's gradient norm and step in every epoch, as a run's history has them."""
    images, test = data_of(setting)
    steps = {"max_step": 2.0, "shortest": 0.5, "longest": 1.75}  # in units of ε
    arguments = {name: share * setting["epsilon"] for name, share in steps.items()} if method == "atas" else {}
    trainer = start(method, images, test, setting, seed, **arguments)
    for epoch in range(trainer.recipe.epochs):
        trainer.train_epoch(epoch)
    return {name: values for name, values in trainer.recorder.arrays().items() if name != "filters"}


def train(part: str, rows: list[int], step: float, seed: int, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """Fast-AT on these training examples, and what it can do at LOOKS moments spread over the training."""
    images, test = data_of(setting)
    # Another network than the one that the norms were measured on.
    trainer = start("fastat", images[torch.tensor(rows)], test, setting, 1000 + seed, step=step * setting["epsilon"])
    lines, epochs = [], trainer.recipe.epochs
    clean = attack_from_name("clean", setting["epsilon"])
    for epoch in range(epochs):
        measured = trainer.train_epoch(epoch)
        if LOOKS * (epoch + 1) // epochs == LOOKS * epoch // epochs:
            continue
        looks = [("clean", test, clean), ("robust", test, trainer.attack)]
        if epoch + 1 == epochs:
            looks.append(("all", images, trainer.attack))
        accuracies = {
            name: robust_correct(trainer.model, of, attack, seed=seed).float().mean().item()
            for name, of, attack in looks
        }
        place = {"epoch": epoch + 1, "iteration": (epoch + 1) * trainer.steps_per_epoch, "attack": ATTACK}
        lines.append({**place, **accuracies, "train": measured["train"], "perturbation": measured["perturbation"]})
    return lines


def rows_of(part: str, groups: Deciles, seed: int) -> list[int]:
    """The positions of a part of the training set."""
    what = PARTS[part]
    if isinstance(what, tuple):
        return groups.rows(*what).tolist()
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randperm(len(groups.group), generator=generator)[: round(what * len(groups.group))].sort().values.tolist()
    )


Runs = dict[tuple[str, float], list[list[dict[str, Any]]]]


def draw(runs: Runs, steps: Sequence[float], path: Path, said: str) -> None:
    """PGD accuracy on the test images by iteration, a panel for each step, a line for each part."""
    figure, panels = plt.subplots(
        1, len(steps), figsize=(4.7 * len(steps) + 0.4, 4.3), layout="constrained", sharey=True, squeeze=False
    )
    for axes, step in zip(panels[0], steps, strict=True):
        for part, (color, dash, marker) in STYLES.items():
            seeds = runs[part, step]
            iterations = [line["iteration"] for line in seeds[0]]
            values = np.array([[100 * line["robust"] for line in lines] for lines in seeds])
            axes.plot(iterations, values.mean(0), dash, color=color, marker=marker, ms=4, linewidth=1.5, label=part)
            for lines in seeds:
                collapse = catastrophic_overfitting(lines)
                if collapse is not None:
                    after = collapse.after
                    axes.plot(after["iteration"], 100 * after["robust"], "x", color=color, ms=9, markeredgewidth=2)
        axes.set(xlabel="iteration", ylim=(0, None))
        axes.set_title(f"step {step:g} ε", fontsize=10)
    panels[0, 0].set_ylabel("PGD-10 accuracy on test images (%)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(said, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def cell(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def table(runs: Runs, counts: dict[str, int], steps: Sequence[float]) -> list[str]:
    lines = [
        "| trained on | examples | step | clean, test | PGD-10, test | PGD-10, all training images "
        "| own images as attacked | collapsed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for part in PARTS:
        for step in steps:
            seeds = runs[part, step]
            last = [of[-1] for of in seeds]
            cells = [cell([line[key] for line in last]) for key in ("clean", "robust", "all", "train")]
            collapsed = sum(catastrophic_overfitting(of) is not None for of in seeds)
            lines.append(
                f"| {part} | {counts[part]} | {step:g} ε | {' | '.join(cells)} | {collapsed} of {len(seeds)} |"
            )
    return lines


def agreement(norms: list[Tensor]) -> str:
    """The rank correlations of the averages between the first seed and the others."""
    found = [spearmanr(norms[0].numpy(), other.numpy()).statistic for other in norms[1:]]
    return ", ".join(f"{value:.2f}" for value in found)


def seen(runs: Runs, steps: Sequence[float]) -> str:
    """How many runs collapsed, and how the parts of a fifth and of two fifths compare."""
    every = [of for seeds in runs.values() for of in seeds]
    collapsed = sum(catastrophic_overfitting(of) is not None for of in every)
    said = f"Collapsed: {collapsed} of {len(every)} runs"
    if collapsed == 0:
        said += ", so that this setting says nothing about which examples bring catastrophic overfitting about"
    sentences = [said]
    for step in steps:
        for share in ("20 %", "40 %"):
            robust = {
                kind: statistics.mean(of[-1]["robust"] for of in runs[f"{kind} {share}", step])
                for kind in ("lowest", "highest", "random")
            }
            order = sorted(robust.items(), key=lambda item: -item[1])
            ranked = ", then ".join(f"the {kind} {100 * value:.1f}" for kind, value in order)
            sentences.append(f"PGD-10 on test images after training on {share} with step {step:g} ε: {ranked}")
    return ". ".join(sentences) + "."


def document(
    runs: Runs, histories: dict[str, History], setting: dict[str, Any], steps: Sequence[float], command: str, stem: str
) -> str:
    """The page: what was done, on what, and what was seen."""
    fast = [history for name, history in histories.items() if name.startswith("fastat")]
    norms = [average_gradient_norm(history) for history in fast]
    groups = [deciles(norm, history.label) for norm, history in zip(norms, fast, strict=True)]
    used = deciles(norms[0], fast[0].label, by_class=setting["by_class"])
    counts = {part: len(rows_of(part, used, 0)) for part in PARTS}
    done = sorted({of[-1]["iteration"] for seeds in runs.values() for of in seeds})
    means = [norms[0][groups[0].rows(place, place)].mean().item() for place in (1, 5, 10)]
    atas = histories["atas-0"]
    across = spearmanr(norms[0].numpy(), average_gradient_norm(atas).numpy()).statistic
    iterations = f"{done[0]:,}" if len(done) == 1 else f"{done[0]:,} to {done[-1]:,}"
    chosen = "Parts are made of deciles over all classes, so that a part may have few examples of one."
    if setting["by_class"]:
        chosen = f"Parts are made of deciles within each class, or some would lack a class: {used}."
    between = "Between seeds the averages rank the examples alike: Spearman's ρ of seed 0 with the others is "
    lines = [
        "# Training on examples of small or large gradient norm",
        "",
        f"`{command}`, {datetime.date.today().isoformat()}, {platform.machine()} CPU, {os.cpu_count()} cores, "
        f"1 thread a run, torch {torch.__version__}, Python {platform.python_version()}.",
        "",
        f"{setting['data']}, {len(fast[0].label):,} training images; `{setting['model']}`; "
        f"ε = {setting['epsilon']:.3g} in ℓ∞; batch {setting['batch']}, SGD 0.9 with the rate going "
        f"0 → {setting['lr']:g} → 0, no augmentation; {len(fast)} seed{'s' if len(fast) > 1 else ''}.",
        "",
        "## The norms",
        "",
        f"Fast-AT with step 1.25 ε on everything; every example's ‖∇ℓ‖₂ at the random start of its attack, averaged "
        f"over {len(fast[0].gradient_norm)} epochs. Seed 0: the average is {means[0]:.3g} in the first decile, "
        f"{means[1]:.3g} in the fifth and {means[2]:.3g} in the tenth; {groups[0]}."
        + (f" {between}{agreement(norms)}." if len(norms) > 1 else "")
        + f" With the averages under ATAS (seed 0) it is {across:.2f}.",
        "",
        f"![Gradient norm and step under ATAS, by epoch]({stem}-epochs.png)",
        "",
        "*Under ATAS, whose step is smaller where the norm is larger: means over deciles of its own average norm.*",
        "",
        "## Training on parts",
        "",
        f"Fast-AT, new networks, {iterations} iterations each; accuracy in % at the end, mean ± standard deviation "
        f"over the seeds. {chosen} The random parts are as large as the others of 20 % and 40 %.",
        "",
        f"![PGD-10 accuracy by iteration]({stem}.png)",
        "",
        *table(runs, counts, steps),
        "",
        seen(runs, steps),
        "",
        "A run has collapsed where `bilevel_at.train.catastrophic_overfitting` says so of the looks on test images. No "
        "epoch was chosen by them: the figures are those of the last iteration.",
    ]
    return "\n".join(lines) + "\n"


def benchmark(
    data: str = "digits",
    data_dir: str = "data",
    model: str = "small_cnn",
    epsilon: float = 0.2,
    steps: tuple[float, ...] = (1.25, 2.0),
    seeds: int = 3,
    epochs: int = 30,
    batch: int = 64,
    lr: float = 0.1,
    examples: int | None = None,
    by_class: bool = True,
    jobs: int | None = None,
    folder: str = "runs/gradient-norms",
    write: str | None = None,
) -> None:
    """Measure the norms, train on the parts, and compare.

    Args:
        data: a data set that lies in memory, by name.
        data_dir: where it lies.
        model: network by name.
        epsilon: radius.
        steps: Fast-AT's steps on the parts, in units of ε.
        seeds: seeds 0 … seeds − 1.
        epochs: passes over all training images; parts take as many iterations.
        batch: examples in a batch.
        lr: peak learning rate.
        examples: use that many training and test images; all if not given.
        by_class: take the deciles within each class, so that no part lacks one; over all classes otherwise.
        jobs: runs side by side; one for each core if not given.
        folder: where each run is kept; what is there is not repeated.
        write: a markdown file for the page, with the figures beside it; in the folder if not given.
    """
    if not steps or min(steps) <= 0:
        raise InputError(f"--steps are {' '.join(map(str, steps)) or 'none'}; they must be positive, such as 1.25 2")
    at_least_one(seeds=seeds)
    setting: dict[str, Any] = {"data": data, "data_dir": data_dir, "model": model, "epsilon": epsilon}
    setting |= {"batch": batch, "lr": lr, "examples": examples, "epochs": epochs, "by_class": by_class}
    images, _ = data_of(setting)
    setting["iterations"] = epochs * len(range(0, len(images), batch))
    place, console = Path(folder), Console()
    place.mkdir(parents=True, exist_ok=True)
    _same(place / "setting.json", setting)
    context = multiprocessing.get_context("spawn")
    keys = [("fastat", seed) for seed in range(seeds)] + [("atas", 0)]
    with ProcessPoolExecutor(jobs or os.cpu_count(), context) as pool, Progress(console=console) as progress:
        task = progress.add_task("norms", total=len(keys) + len(PARTS) * len(steps) * seeds)
        missing = [key for key in keys if not (place / f"{key[0]}-{key[1]}" / "history.npz").exists()]
        progress.advance(task, len(keys) - len(missing))
        measured = {pool.submit(measure, *key, setting): key for key in missing}
        for run in as_completed(measured):
            home = place / "{}-{}".format(*measured[run])
            home.mkdir(exist_ok=True)
            np.savez(home / "history.npz", **run.result())
            progress.advance(task)
        histories: dict[str, History] = {}
        for method, seed in keys:
            found = read_history(place / f"{method}-{seed}")
            assert found is not None
            histories[f"{method}-{seed}"] = found
        files, started = {}, {}
        for seed in range(seeds):
            history = histories[f"fastat-{seed}"]
            groups = deciles(average_gradient_norm(history), history.label, by_class=by_class)
            for part in PARTS:
                for step in steps:
                    file = place / f"{part.replace(' %', '').replace(' ', '-')}-step{step:g}-seed{seed}.json"
                    files[part, step, seed] = file
                    if file.exists():
                        progress.advance(task)
                        continue
                    begun = pool.submit(train, part, rows_of(part, groups, seed), step, seed, setting)
                    started[begun] = file
        for ended in as_completed(started):
            started[ended].write_text(json.dumps(ended.result()) + "\n")
            progress.update(task, advance=1, description=f"done: {started[ended].stem}")
    runs = {(p, s): [json.loads(files[p, s, seed].read_text()) for seed in range(seeds)] for p in PARTS for s in steps}
    page = Path(write) if write is not None else place / "gradient-norms.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    said = f"{data}, ε = {epsilon:.3g}: Fast-AT on parts of the training set, mean of {seeds} seeds; ✗ collapsed"
    draw(runs, steps, page.with_suffix(".png"), said)
    gradient_norms(histories["atas-0"], page.with_name(f"{page.stem}-epochs.png"))
    command = f"python benchmarks/gradient_norms.py --seeds {seeds}"
    defaults = {flag.name: flag.default for flag in flags.flags_of(benchmark)}
    given = {"data": data, "model": model, "epsilon": epsilon, "epochs": epochs, "batch": batch, "lr": lr}
    given |= {"steps": steps, "examples": examples, "by_class": by_class}
    for name, value in given.items():
        if value != defaults[name]:
            text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            command += " --no-by-class" if name == "by_class" else f" --{name} {text}"
    page.write_text(document(runs, histories, setting, steps, command, page.stem))
    console.print(f"{page}, {page.stem}.png and {page.stem}-epochs.png")


def _same(file: Path, setting: dict[str, Any]) -> None:
    """What is kept in the folder was made with this setting, or InputError."""
    if file.exists() and json.loads(file.read_text()) != setting:
        raise InputError(f"{file.parent} holds runs of another setting ({file.name}); choose another --folder")
    file.write_text(json.dumps(setting) + "\n")


def command(args: Sequence[str]) -> int:
    about = "Training on examples of small or of large input gradient norm."
    benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/gradient_norms.py", about))
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/gradient_norms.py"))
