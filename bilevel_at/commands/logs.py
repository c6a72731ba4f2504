"""``--logger tensorboard`` and ``--logger wandb``: the epochs of a run where those programs show them.

``metrics.jsonl`` and ``results.json`` are the record; a log follows them. Whatever goes wrong in a log, the run goes
on, and with ``--resume`` the log is brought up to date. Another program is a subclass of :class:`Log`, and a line in
:data:`LOGS`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ..errors import InputError
from ..runs.directory import RunDir

__all__ = ["LOGS", "Log", "Logs"]


class Log:
    """What a program that shows curves is told.

    Args:
        run: the directory of the run.
        config: the content of ``config.json``.
    """

    package: str
    """What is to be installed; it is imported where a log is made."""

    def __init__(self, run: RunDir, config: Mapping[str, Any]) -> None:
        self.run, self.config = run, config

    def epochs(self) -> int:
        """How many epochs the log has already: those of the run before it was resumed."""
        raise NotImplementedError

    def epoch(self, number: int, values: Mapping[str, float]) -> None:
        """Log the numbers of an epoch; epochs come in order, each once."""
        raise NotImplementedError

    def results(self, number: int, values: Mapping[str, float]) -> None:
        """Log the accuracies at the end, after that many epochs; the same ones may come again."""
        raise NotImplementedError

    def close(self) -> None:
        """Finish."""


class TensorBoard(Log):
    """Event files in ``RUN/tensorboard``; ``tensorboard --logdir runs`` shows them."""

    package = "tensorboard"

    def __init__(self, run: RunDir, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(run, config)
        self._folder = run.path / "tensorboard"
        self._there = self._logged()
        done = len(run.metrics())
        # Epochs that a log has and the run has not, after damage, are trained again: what was logged of them goes.
        self._there = {(tag, step) for tag, step in self._there if step <= done}
        self._writer = SummaryWriter(str(self._folder), purge_step=done + 1 if self._there else None)
        if not self._there:
            self._writer.add_text("config", f"```json\n{json.dumps(config, indent=1, default=str)}\n```", 0)

    def _logged(self) -> set[tuple[str, int]]:
        """(tag, step) of all that is in the event files."""
        if not self._folder.is_dir():
            return set()
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        return {
            (value.tag, event.step)
            for file in sorted(self._folder.glob("events.out.tfevents.*"))
            for event in EventFileLoader(str(file)).Load()
            for value in event.summary.value
        }

    def epochs(self) -> int:
        return max((step for tag, step in self._there if tag == "loss"), default=0)

    def epoch(self, number: int, values: Mapping[str, float]) -> None:
        self._add(number, values)

    def results(self, number: int, values: Mapping[str, float]) -> None:
        self._add(number, {f"test/{name}": value for name, value in values.items()})

    def _add(self, number: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if (name, number) not in self._there:
                self._writer.add_scalar(name, value, number)
                self._there.add((name, number))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB(Log):
    """A run of the project ``bilevel-at``, or ``$WANDB_PROJECT``; ``$WANDB_MODE=offline`` keeps it in ``RUN/wandb``."""

    package = "wandb"
    STATE = "wandb-log.json"

    def __init__(self, run: RunDir, config: Mapping[str, Any]) -> None:
        import wandb

        super().__init__(run, config)
        known = self._state()
        unique = hashlib.sha256(f"{run.path.resolve()} {os.urandom(8).hex()}".encode()).hexdigest()[:12]
        self._id = str(known.get("id") or unique)
        self._count = int(known.get("epochs") or 0)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "bilevel-at"),
            name=run.path.resolve().name,
            id=self._id,
            resume="allow",
            dir=str(run.path),
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._remember()

    def _state(self) -> Mapping[str, Any]:
        try:
            known = self.run.read_json(self.STATE) if self.run.has(self.STATE) else {}
        except InputError:  # damaged: a log of its own begins
            known = {}
        return known if isinstance(known, dict) and isinstance(known.get("epochs"), int) else {}

    def _remember(self) -> None:
        self.run.write_json(self.STATE, {"id": self._id, "epochs": self._count})

    def epochs(self) -> int:
        return self._count

    def epoch(self, number: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=number)
        self._count = number
        self._remember()

    def results(self, number: int, values: Mapping[str, float]) -> None:
        self._run.summary.update({f"test/{name}": value for name, value in values.items()})

    def close(self) -> None:
        self._run.finish()


# The flag is --logger, because torchrun takes --log for an abbreviation of flags of its own, wherever it stands.
LOGS: dict[str, type[Log]] = {"tensorboard": TensorBoard, "wandb": WandB}


class Logs:
    """The logs of a run, of which any may fail.

    Args:
        names: of :data:`LOGS`.
        say: is told, in a line, what fails.
    """

    def __init__(self, names: Sequence[str], say: Callable[[str], None]) -> None:
        self.names, self.say = tuple(dict.fromkeys(names)), say
        self._open: dict[str, Log] = {}

    @staticmethod
    def check(names: Sequence[str]) -> None:
        """Check that the packages are installed.

        Raises:
            InputError: if one is not.
        """
        for name in names:
            if find_spec(LOGS[name].package) is None:
                raise InputError(f"--logger {name} needs {LOGS[name].package}: pip install 'bilevel-at[{name}]'")

    def begin(self, run: RunDir) -> None:
        """Open the logs, and bring them up to date with a run that is resumed."""
        for name in self.names:
            self._try(name, lambda name=name: self._open.update({name: LOGS[name](run, run.config())}))  # type: ignore[misc]
        self.follow(run.metrics())

    def follow(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Log the epochs of ``metrics.jsonl`` that are not in the logs yet."""
        for name, log in list(self._open.items()):
            self._try(name, lambda log=log: _catch_up(log, lines))  # type: ignore[misc]

    def results(self, epochs: int, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """Log the accuracies of the final table: checkpoint -> attack -> score."""
        values = {f"{which}/{name}": score.accuracy for which, row in scores.items() for name, score in row.items()}
        for name, log in list(self._open.items()):
            self._try(name, lambda log=log: log.results(epochs, values))  # type: ignore[misc]

    def close(self) -> None:
        for name, log in list(self._open.items()):
            self._try(name, log.close)
        self._open.clear()

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except (Exception, SystemExit) as error:  # of another program, from its network to its disk
            self._open.pop(name, None)
            reason = " ".join(str(error).split())[:200]
            self.say(f"--logger {name} has stopped, and the run goes on ({type(error).__name__}: {reason})")


def _catch_up(log: Log, lines: Sequence[Mapping[str, Any]]) -> None:
    done = log.epochs()
    for line in lines:
        number = int(line["epoch"])
        if number > done:
            finite = {k: float(v) for k, v in line.items() if isinstance(v, (int, float)) and math.isfinite(v)}
            finite.pop("epoch", None)
            log.epoch(number, finite)
