"""The directory of a run, and how a run is started or resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import shares
from ..errors import InputError
from ..runs.directory import RESULTS, RunDir, plain
from ..runs.history import history_arrays
from ..train import Trainer
from .options import RunOptions
from .plan import Plan
from .prepare import Prepared
from .processes import agreed, on_device
from .saving import MIDWAY

__all__ = ["begin_or_resume", "resumes", "run_directory"]

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


def begin_or_resume(
    plan: Plan, prepared: Prepared, run: RunDir, memory_format: dict[str, Any], trainer: Trainer
) -> None:
    """Write the configuration of a run that starts now, or take up the state of one that was interrupted.

    Of several processes the first alone reads and writes.

    Args:
        plan, prepared, run, trainer: of the command.
        memory_format: as ``config.json`` has it.

    Raises:
        InputError: if a setting, the problem file or the training images differ from the saved ones, or the run's files
            are inconsistent.
    """
    several, device = shares.count() > 1, prepared.test.device

    def here() -> _Found | None:
        config = plan.config(prepared.model, prepared.train, prepared.extra) | {"memory_format": memory_format}
        if resumes(plan.options, run):
            return _found(run, config, torch.device("cpu") if several else device, plan.defaults())
        run.begin(config)
        return None

    state = shares.first(here)
    if state is not None:
        agreed(lambda: _take_up(run, state, trainer, device))
        shares.first(lambda: _settle(run, state.which, trainer.done))


@dataclass(frozen=True)
class _Found:
    """What a run has come to.

    Args:
        which: the name of the checkpoint.
        state: its content; None if the run has none.
        history: the recorder's arrays.
    """

    which: str
    state: dict[str, Any] | None
    history: dict[str, Any]


def _found(run: RunDir, config: dict[str, Any], device: torch.device, defaults: Mapping[str, Any]) -> _Found:
    """The state of an interrupted run: inside an epoch, or at the end of the last one.

    Args:
        run: the directory.
        config: the configuration of this command.
        device: where tensors are loaded to.
        defaults: of the settings, by section; those of a run from before there was such a setting.
    """
    _same_settings(run, run.config(), plain(config), defaults)
    run.recover()
    if run.has(RESULTS):
        run.read_json(RESULTS)  # where it is damaged, say so before training, and not after it
    which, state = _newest(run, device)
    if state is None and len(run.metrics()) > 1:  # one: an earlier version was stopped while saving its first epoch
        raise InputError(f"{run} has metrics of {len(run.metrics())} epochs, but no checkpoint; choose another --out")
    return _Found(which, state, {} if state is None else history_arrays(run))


def _take_up(run: RunDir, found: _Found, trainer: Trainer, device: torch.device) -> None:
    """Load what was found into the trainer."""
    if found.state is not None:
        try:
            trainer.load_state_dict(found.state if shares.count() == 1 else on_device(found.state, device))
        except Exception as error:  # load_state_dict raises many types of errors for foreign content
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"{run}/{found.which}.pt is not a checkpoint of this run ({type(error).__name__}: {reason})"
            ) from error
    if trainer.done:  # before the first epoch's end, the recorder has what it starts with
        trainer.recorder.restore(found.history, trainer.done)


def _settle(run: RunDir, which: str, epochs: int) -> None:
    """Make the directory's files those of the epochs that are done."""
    if which != MIDWAY:  # a kill has left it after the end of its epoch, and the last epoch has no next one's end
        run.remove_checkpoint(MIDWAY)
    if len(run.metrics(epochs=epochs)) != epochs:
        raise InputError(f"{run}/metrics.jsonl does not have the {epochs} epochs that {which}.pt has")


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
