"""The shortest training to 45 %, 48 % and 50 % under AutoAttack: CIFAR-10, ε = 8/255 in ℓ∞, a PreActResNet-18.

    python benchmarks/speedrun.py --data-dir D --write docs/results --minutes 9

Each composition is a command of ``python -m bilevel_at.run``. Its seconds are those of training epochs: augmentation,
attacks, updates and, with ``--compile``, compiling without torch's caches; loading the data and looking at held-out
images are not counted. Its operations are those that ``--dry-run`` counts. The last epoch is attacked on all test
images with ``nearest-40-3-2``, which leaves what AutoAttack leaves to about 0.3 points; then AutoAttack goes to the
compositions that may reach a target, in the order of their seconds, until one does.

Whatever is done is not repeated, and a run that was interrupted or killed goes on, so the same command may be given
until it says that it is done; its exit status is 3 where ``--minutes`` were up. Training that failed is on record as
such, and tried again when its ``speedrun-….json`` is deleted. On a CPU, ``--compositions fastbat-20 --model small_cnn
--epochs 1 --examples 200 --held-out 20 --test-examples 20 --no-compile --targets 5`` shows that it works.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pages import at_least_one
from pieces import in_pieces
from speedrun_runs import Entry, Speedrun

import bilevel_at as ba
from bilevel_at.commands import flags
from bilevel_at.commands.device import resolve_device
from bilevel_at.commands.plan import understand
from bilevel_at.data import load_data
from bilevel_at.runs.provenance import device_name, today

# Candidates and no results. The recipe is the file's for CIFAR-10, with these flags.
ONE_CYCLE = "--schedule one-cycle --lr 0.2 --momentum 0.9 --peak-momentum 0.8"
SMOOTH = "--label-smoothing 0.4 --ema 0.999"
COMPOSITIONS = {
    "fastbat-20": "problems/fastbat.py",  # as published
    "fastbat-12": "problems/fastbat.py --epochs 12",
    "fastbat-12-batch-256": "problems/fastbat.py --epochs 12 --batch-size 256 --lr 0.3",
    "fastbat-15-merged": "problems/fastbat.py --epochs 15 --cross-at merged --no-compile",  # it is no graph
    "fastbat-15-lazy": "problems/fastbat.py --epochs 15 --solver lazy --p 0.25",
    "fastbat-15-without-term": "problems/fastbat.py --epochs 15 --solver zero-ig",
    "fastbat-20-smooth": f"problems/fastbat.py --solver zero-ig {SMOOTH}",
    "remembered-fastbat-15": f"problems/remembered_fastbat.py --epochs 15 {ONE_CYCLE}",
    "atas-15": f"problems/atas.py --epochs 15 {ONE_CYCLE}",
    "atas-30": "problems/atas.py",  # as published
    "nfgsm-15": "problems/nfgsm.py --epochs 15",
    "nfgsm-30-smooth": f"problems/nfgsm.py {SMOOTH}",
    "fgsm-pgi-15": f"problems/fgsm_pgi.py --epochs 15 {ONE_CYCLE} --ema 0.999",
    "fgsm-pgi-40": f"problems/fgsm_pgi.py --epochs 40 {ONE_CYCLE} --ema 0.9995",
    "pgd-2-15": "problems/minmax.py --steps 2 --step 4/255 --epochs 15",
    "pgd-2-30-smooth": f"problems/minmax.py --steps 2 --step 4/255 --epochs 30 {SMOOTH}",
    "nuat-30": f"problems/nuat.py --epochs 30 --batch-size 128 {ONE_CYCLE} --ema 0.999",
    "liet-40": f"problems/liet.py --epochs 40 {ONE_CYCLE}",
    "trades-4-30": f"problems/trades.py --steps 4 --step 3/255 --epochs 30 {ONE_CYCLE} --weight-decay 5e-4 --ema 0.999",
    "pgd-10-40-modern": "problems/minmax.py --recipe modern --epochs 40",
}


def names_of(chosen: Sequence[str] | None, own: Sequence[str]) -> dict[str, str]:
    """Compositions by name: those chosen, or all where none is the user's own, and the user's own."""
    chosen = chosen if chosen is not None else () if own else tuple(COMPOSITIONS)
    for name in chosen:
        if name not in COMPOSITIONS:
            raise ba.InputError(f"--compositions {name} is not known; choose from {', '.join(COMPOSITIONS)}")
    digest = {text: hashlib.sha256(text.encode()).hexdigest()[:6] for text in own}
    return {name: COMPOSITIONS[name] for name in chosen} | {
        f"{Path((shlex.split(text) or [''])[0]).stem}-{digest[text]}": text for text in own
    }


def benchmark(
    data_dir: str = "data",
    compositions: tuple[str, ...] | None = None,
    composition: tuple[str, ...] = (),
    targets: tuple[float, ...] = (45.0, 48.0, 50.0),
    margin: float = 0.5,
    seeds: int = 1,
    model: str = "preact_resnet18",
    epochs: int | None = None,
    batch_size: int | None = None,
    examples: int | None = None,
    held_out: int = 500,
    test_examples: int | None = None,
    precision: Literal["float32", "bfloat16"] = "bfloat16",
    compile: bool = True,
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto",
    device: str = "auto",
    folder: str = "runs/speedrun",
    minutes: float | None = None,
    write: str | None = None,
) -> int:
    """Train and attack the compositions.

    Args:
        data_dir: where CIFAR-10 lies.
        compositions: by name, of the table in this file; all if not given, and none beside --composition.
        composition: your own, each a text such as "problems/fastat.py --epochs 12".
        targets: accuracies under AutoAttack, in %.
        margin: AutoAttack goes to what the cheap attack leaves at most so many points below a target.
        seeds: seeds 0 … seeds − 1; a target is reached by the mean.
        model: the network.
        epochs: instead of the compositions'.
        batch_size: instead of the compositions'.
        examples: train on this many only.
        held_out: training images that are held out; nothing is chosen by them, and the last epoch is evaluated.
        test_examples: evaluate on this many only.
        precision: where a composition names none.
        compile: where a composition says neither.
        memory_format: where a composition names none.
        device: cpu, cuda, or auto.
        folder: where the runs go.
        minutes: stop after so many, to go on with the same command.
        write: a folder for the results files and the page; the runs' folder if not given.
    """
    at_least_one(seeds=seeds, epochs=epochs, batch_size=batch_size, test_examples=test_examples, held_out=held_out)
    place = resolve_device(device)
    where = device_name(place)
    first = ["--data", "cifar10", "--model", model, "--held-out", str(held_out), "--select", "pgd-10-1"]
    first += ["--precision", precision, "--memory-format", memory_format, "--compile" if compile else "--no-compile"]
    reduced = {"epochs": epochs, "batch-size": batch_size, "examples": examples, "test-examples": test_examples}
    last = [text for k, v in reduced.items() if v is not None for text in (f"--{k}", str(v))]
    last += ["--data", "cifar10", "--data-dir", data_dir, "--device", device, "--attacks", "clean"]
    entries = []
    for seed in range(seeds):
        for name, text in names_of(compositions, composition).items():
            file, *own = shlex.split(text)
            out = Path(folder) / f"{name}-seed{seed}"
            job = [file, *first, *own, *last, "--seed", str(seed), "--out", str(out)]  # of two flags the last counts
            understand(job)  # a mistake shows before anything is trained
            record = f"speedrun-{name}-seed{seed}-{where.replace(' ', '-')}.json"
            entries.append(Entry(name, seed, text, job, out, record))
    _, test = load_data("cifar10", data_dir)
    test = (test if test_examples is None else test.sample(test_examples)).to(place)
    full = place.type != "cpu" and not any(reduced.values()) and model == "preact_resnet18"
    about = {"date": today(), "device": where, "model": model, "proof": not full}
    speedrun = Speedrun(entries, Path(write or folder), test, about, targets)
    return in_pieces(lambda: speedrun.work(margin), minutes)


def command(args: Sequence[str]) -> int:
    about = "The shortest training to an accuracy under AutoAttack."
    return benchmark(**flags.parse(flags.flags_of(benchmark), args, "python benchmarks/speedrun.py", about))


if __name__ == "__main__":
    sys.exit(flags.main(command, "benchmarks/speedrun.py"))
