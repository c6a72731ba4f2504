"""The directory of a run, and how a run is started or resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..runs.directory import RESULTS, RunDir, plain
from ..runs.history import history_arrays
from ..train import Trainer
from .options import RunOptions
from .saving import MIDWAY

__all__ = ["begin", "resume", "resumes", "run_directory"]

ROUNDING = ("device", "compile", "memory_format", "attacks", "data_dir", "download", "test_examples")
"""Options that may differ when a run is resumed, because they change the trained weights by rounding at most."""
MAY_CHANGE = (*ROUNDING, "skip_nonfinite")  # a run that was stopped by what is not finite may go on without it


def run_directory(options: RunOptions, problem: str) -> RunDir:
    """The run directory: ``--out``, or the first free runs/NAME; with ``--resume``, the last existing one.

    With ``--resume auto`` it is the first of all where none exists.
    """
    asked = options.resume
    if options.out is not None:
        run = RunDir(options.out)
        if run.path.exists() and not run.path.is_dir():
            raise InputError(f"--out {run} is a file; it must be a directory, or not exist")
        if run.exists and asked == "no":
            raise InputError(f"{run} already holds a run; add --resume to go on with it, or choose another --out")
    else:
        stem = f"{problem}-{Path(options.data).stem}-seed{options.seed}"
        paths = [Path("runs") / stem, *(Path("runs") / f"{stem}-{i}" for i in range(2, 10_000))]
        free = next(i for i, path in enumerate(paths) if not path.exists())
        run = RunDir(paths[free] if asked == "no" else paths[max(0, free - 1)])
    if asked == "yes" and not run.exists:
        raise InputError(f"there is no run to resume in {run}; --resume auto would begin one")
    return run


def resumes(options: RunOptions, run: RunDir) -> bool:
    """Whether this command goes on with a run."""
    return options.resume != "no" and run.exists


def begin(run: RunDir, config: dict[str, Any]) -> None:
    """Write the configuration of a run that starts now."""
    run.begin(config)


def resume(
    run: RunDir, config: dict[str, Any], trainer: Trainer, device: torch.device, defaults: Mapping[str, Any]
) -> None:
    """Load the state of an interrupted run into the trainer: inside an epoch, or at the end of the last one.

    Args:
        run: the directory.
        config: the configuration of this command.
        trainer: the trainer.
        device: where tensors are loaded to.
        defaults: of the settings, by section; those of a run from before there was such a setting.

    Raises:
        InputError: if a setting, the problem file or the training images differ from the saved ones, or the run's files
            are inconsistent.
    """
    _same_settings(run, run.config(), plain(config), defaults)
    run.recover()
    if run.has(RESULTS):
        run.read_json(RESULTS)  # where it is damaged, say so before training, and not after it
    which, state = _newest(run, device)
    if state is not None:
        try:
            trainer.load_state_dict(state)
        except Exception as error:  # load_state_dict raises many types of errors for foreign content
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"{run}/{which}.pt is not a checkpoint of this run ({type(error).__name__}: {reason})"
            ) from error
    elif len(run.metrics()) > 1:  # one: a run of an earlier version that was stopped while saving its first epoch
        raise InputError(f"{run} has metrics of {len(run.metrics())} epochs, but no checkpoint; choose another --out")
    if which != MIDWAY:  # a kill has left it after the end of its epoch, and the last epoch has no next one's end
        run.remove_checkpoint(MIDWAY)
    if trainer.done:  # before the first epoch's end, the recorder has what it starts with
        trainer.recorder.restore(history_arrays(run), trainer.done)
    if len(run.metrics(epochs=trainer.done)) != trainer.done:
        raise InputError(f"{run}/metrics.jsonl does not have the {trainer.done} epochs that {which}.pt has")


def _newest(run: RunDir, device: torch.device) -> tuple[str, dict[str, Any] | None]:
    """(name, content) of the checkpoint that the run has come furthest in; no content if it has none."""
    ended = "last" in run.checkpoints
    if run.has_checkpoint(MIDWAY):
        epochs = run.checkpoint("last", memories=False).get("epochs", 0) if ended else 0
        midway = run.checkpoint(MIDWAY, device)
        # One of an epoch that has ended since is what a kill left between two files.
        if midway.get("epochs", -1) >= epochs:
            return MIDWAY, midway
    return "last", run.checkpoint("last", device) if ended else None


def _same_settings(run: RunDir, before: Any, now: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise InputError if a setting differs from the saved one, or from its default where none is saved."""
    try:
        settings = {section: dict(before[section]) for section in ("problem", "solver", "options")}
        file = before["file_sha256"]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{run}/config.json is not one of bilevel_at.run; choose another --out") from None
    if file != now["file_sha256"]:
        raise InputError(f"{run} was started with another {before.get('file')}; it has changed since")
    old, new = (config.get("argument_sha256") or {} for config in (before, now))
    for name in sorted(set(old) & set(new)):
        if old[name] != new[name]:
            raise InputError(f"{run} was started with another {now['problem'][name]}; it has changed since")
    for key, what in (("data_sha256", "training"), ("extra_sha256", "extra")):
        if before.get(key) != now.get(key):
            raise InputError(f"{run} was started with other {what} images; the data has changed since")
    for section, saved in settings.items():
        for key in sorted({*saved, *now[section]}):
            new = now[section].get(key)
            if key not in saved and key in now[section] and key in defaults[section]:
                old = plain(defaults[section][key])  # it was begun before there was this setting
            else:
                old = saved.get(key)
            if old != new and key not in MAY_CHANGE:
                raise InputError(
                    f"{run} was started with {key} = {old}, and is resumed with {new}; give the same flags"
                )
