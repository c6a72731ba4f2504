"""Train every method in two checkouts with one seed, and compare the weights bit for bit: the proof of a refactoring.

    git worktree add ../before COMMIT
    python benchmarks/compare_weights.py ../before                    # against this checkout
    python benchmarks/compare_weights.py ../before --only atas free
    python benchmarks/compare_weights.py ../before --first-edition    # settings that were changed since, set back here

A line a case; exits 0 if all weights and buffers are equal. About a minute for each checkout on one CPU core. Both
sides run in this environment, each with the package of its own folder.

A change of a published setting (docs/methods.md) changes the weights on purpose. ``FIRST_EDITION`` has the flags that
give the old setting back, so that everything around the setting can still be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
COMMON = [
    "--epochs",
    "3",
    "--examples",
    "300",
    "--test-examples",
    "20",
    "--attacks",
    "clean",
    "--select",
    "clean",
    "--device",
    "cpu",
]

CASES = {
    **{name: [name] for name in ("standard", "fgsm", "fastat", "minmax", "fastbat", "gradalign", "atta", "atas")},
    **{name: [name] for name in ("sgd_bca", "asgd_bca", "free", "beta", "smooth_beta", "trades", "mart")},
    "remembered_fastbat": ["remembered_fastbat"],
    "fastbat zero-ig": ["fastbat", "--solver", "zero-ig"],
    "fastbat full-kkt": ["fastbat", "--solver", "full-kkt", "--damping", "1"],
    "fastbat cross at solution": ["fastbat", "--cross-at", "solution"],
    "fastbat corner": ["fastbat", "--anchor", "corner"],
    "fastbat sign-step": ["fastbat", "--anchor", "sign-step"],
    "fgsm uniform": ["fgsm", "--start", "uniform"],
    "gradalign on PGD-2": ["gradalign", "--steps", "2"],
    "atas crop-flip": ["atas", "--augment", "crop-flip"],
    "atas small": ["atas", "--size", "4"],
    "atta accumulate": ["atta", "--accumulate", "2"],
    "beta hessian-free-kkt": ["beta", "--solver", "hessian-free-kkt"],
    "trades batch-norm": ["trades", "--model", "preact_resnet18", "--examples", "20", "--epochs", "1"],
    "fastbat batch-norm": ["fastbat", "--model", "preact_resnet18", "--examples", "20", "--epochs", "1"],
}

FIRST_EDITION = {
    **dict.fromkeys(("fgsm", "fastat", "minmax", "fastbat", "gradalign"), "--draw set"),
    "atas": "--follow-warmup",
    "trades": "--clip-start",
    "mart": "--clip-start --exact --no-clean-first",
}
"""By problem file: the flags with which today's file repeats the first edition (commit 6875737)."""

DRIVER = """
import json, runpy, sys
from pathlib import Path
checkout, out, cases = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
sys.path.insert(0, checkout)
import bilevel_at
if checkout not in bilevel_at.__path__:  # checkouts from before this was done there
    bilevel_at.__path__.append(checkout)
for name, (file, *flags) in cases.items():
    folder = out / name.replace(" ", "_")
    sys.argv = ["run", f"{checkout}/problems/{file}.py", *flags, "--out", str(folder)]
    try:
        runpy.run_module("bilevel_at.run", run_name="__main__")
    except SystemExit as end:
        print(f"{name}: exit {end.code}", file=sys.stderr)
"""


def train(checkout: Path, out: Path, cases: dict[str, list[str]]) -> None:
    """Every case in one process with the package of that checkout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, str(checkout), str(out), json.dumps(cases)]
    done = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True)
    failures = [line for line in done.stderr.splitlines() if line.strip() and not line.endswith("exit 0")]
    if done.returncode or failures:
        print(f"{checkout}:", *failures[-20:], sep="\n  ")


def difference(old: Path, new: Path) -> str:
    """What differs between two checkpoints' weights and buffers; nothing where they are bitwise equal."""
    states = []
    for folder in (old, new):
        if not (folder / "last.pt").is_file():
            return f"no weights in {folder}"
        states.append(torch.load(folder / "last.pt", weights_only=True)["model"])
    before, after = states
    if before.keys() != after.keys():
        return "other names of parameters"
    unequal = {k: (before[k].double() - after[k].double()).abs().max().item() for k in before}
    unequal = {k: gap for k, gap in unequal.items() if not torch.equal(before[k], after[k])}
    if not unequal:
        return ""
    worst = max(unequal, key=lambda name: unequal[name])
    return f"{len(unequal)} of {len(before)} tensors differ, by up to {unequal[worst]:.3g} ({worst})"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path, nargs="?", default=HERE)
    parser.add_argument("--only", nargs="+", default=[], help="cases whose name begins with one of these")
    parser.add_argument("--first-edition", action="store_true", help="set changed settings back in the second checkout")
    options = parser.parse_args()
    chosen = {name: case for name, case in CASES.items() if not options.only or name.startswith(tuple(options.only))}
    before = {name: [case[0], *COMMON, *case[1:]] for name, case in chosen.items()}
    reset = FIRST_EDITION if options.first_edition else {}
    after = {name: [*flags, *reset.get(flags[0], "").split()] for name, flags in before.items()}
    with tempfile.TemporaryDirectory() as work:
        out = [Path(work) / side for side in ("before", "after")]
        for checkout, folder, cases in zip((options.before, options.after), out, (before, after), strict=True):
            folder.mkdir()
            train(checkout.resolve(), folder, cases)
        gaps = {name: difference(*(folder / name.replace(" ", "_") for folder in out)) for name in chosen}
    for name, gap in gaps.items():
        print(f"{name:<28} {gap or 'equal'}")
    return int(any(gaps.values()))


if __name__ == "__main__":
    sys.exit(main())
