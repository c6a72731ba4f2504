"""The trained networks in the package: train, round, measure what is stored, and write the file.

    python benchmarks/shipped.py [--out FOLDER]

``digits-fastbat`` is what ``python -m bilevel_at.run problems/fastbat.py`` trains, seed 0, best epoch, in 16 bits. The
accuracies in the file are of the stored weights, on the digits' 360 test images. It takes a minute on a CPU core.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bilevel_at.commands import flags
from bilevel_at.commands.run import run
from bilevel_at.data import load_data
from bilevel_at.evaluate import evaluate
from bilevel_at.models import TRAINED
from bilevel_at.runs.shared import card, export, load_shared

PROBLEM = Path(__file__).resolve().parent.parent / "problems" / "fastbat.py"
ATTACKS = ("clean", "fgsm", "pgd-50-10")


def make(out: Path, *more: str) -> Path:
    """Train, and write ``out/digits-fastbat.safetensors``.

    Args:
        out: the folder.
        more: further flags of the run.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        trained, path = Path(folder) / "run", out / TRAINED["digits-fastbat"].name
        if status := run([str(PROBLEM), "--seed", "0", *more, "--out", str(trained)]):
            raise SystemExit(status)
        export(trained, path, half=True)
        epsilon = card(path)["constraint"]["epsilon"]
        scores = evaluate(load_shared(path), load_data("digits")[1], ATTACKS, epsilon, checks=0)
        results = {name: {"accuracy": s.accuracy, "n": s.n, "epsilon": s.epsilon} for name, s in scores.items()}
        return export(trained, path, half=True, results=results)


def benchmark(out: str = str(TRAINED["digits-fastbat"].parent)) -> None:
    """Make the trained networks of the package.

    Args:
        out: the folder they are written to; the package's own by default.
    """
    path = make(Path(out))
    for name, score in card(path)["results"].items():
        print(f"{name:<10} {score['accuracy']:.1%} of {score['n']}")
    print(f"{path}: {path.stat().st_size:,} bytes")


def command(args: Sequence[str]) -> int:
    about = "The trained networks in the package."
    benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/shipped.py", about))
    return 0


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/shipped.py"))
