"""Results in a run directory: ``results.json``, and a file with the outcome of each example for every attack.

The file is also the state of an interrupted attack: the same evaluation resumes from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from .. import shares
from ..data import ImageSet
from ..division import agree
from ..errors import InputError
from ..evaluate.attacks import Attack
from ..evaluate.result import Score, result_name
from ..evaluate.robust import Trace, attack_examples
from ..evaluate.stages import OnSurrogate
from ..evaluate.threat import Threat
from .directory import RESULTS, RunDir
from .headline import WorstCase, under_threat, worst_case
from .manifest import tell
from .provenance import device_name, fingerprint, today, versions

__all__ = ["FOLDER", "Store", "score_from"]

FOLDER = "evaluation"
SAVE_EVERY = 2.0  # seconds


def score_from(entry: Any) -> Score | None:
    """An entry of ``results.json`` as a score; None if it is not one. Unknown keys are ignored."""
    try:
        known = {f.name: entry[f.name] for f in dataclasses.fields(Score) if f.name in entry}
        score = Score(**known)
        return score if isinstance(score.accuracy, (int, float)) and isinstance(score.n, int) else None
    except (AttributeError, KeyError, TypeError):
        return None


def file_name(name: str) -> str:
    """The file name for a result: characters such as the slash of 8/255 are replaced."""
    plain = re.sub(r"[^\w.@+=\[\]-]", "_", name)
    if plain != name.replace("/", "_"):
        plain += "-" + hashlib.sha256(name.encode()).hexdigest()[:6]
    return plain + ".npz"


class _Found(NamedTuple):
    """What is on record of an attack.

    name: the name of the result.
    trace: the outcome of each example so far.
    score: None if the attack is not finished, or its result is not current.
    twin: the checkpoint of the same weights that the score is of, if it is of another one.
    """

    name: str
    trace: Trace
    score: Score | None = None
    twin: str | None = None


class Store:
    """The results of one network (``which``: best, last, last_good, or model) on one image set.

        store = Store(run, "best", model, images, usual=0.2)
        for attack in attacks:
            score = store.score(attack)

    A result on fewer images than an existing one is stored beside it, as ``pgd-50-10[n=100]``.

    Several processes (:func:`bilevel_at.shares.together`) call the same methods and get the same results. Only the
    first of them reads and writes the directory, and warns of damage.

    Args:
        run: the directory.
        which: the checkpoint's name: "best", "last", "last_good" or "model".
        model: the network.
        images: the images to evaluate on.
        usual: the threat whose results have neither ``@radius`` nor ``-l2`` in their names; a number is the radius of
            an ℓ∞ ball. With None, no result has them.
        seed: of the attacks.
        batch_size: images in a batch.
        data: a fingerprint of the images; computed if None.
        twins: names of the checkpoints that the same command has evaluated before. A network with the weights of
            another checkpoint is not attacked again: its results are that checkpoint's, under both names.
    """

    def __init__(
        self,
        run: RunDir,
        which: str,
        model: nn.Module,
        images: ImageSet,
        *,
        usual: Threat | float | None,
        seed: int = 0,
        batch_size: int = 250,
        data: str | None = None,
        twins: Sequence[str] = (),
    ) -> None:
        self.run, self.which, self.model, self.images = run, which, model, images
        self.usual = Threat("linf", usual) if isinstance(usual, (int, float)) else usual
        self.seed, self.batch_size = seed, batch_size
        self.data = images.sha256()[:16] if data is None else data
        self.weights = fingerprint(model)
        agree("the fingerprint of network and images", (self.weights, self.data))
        self.twins = tuple(twins)
        self.traces: dict[str, Trace] = {}
        self.attacks: dict[str, Attack] = {}
        self._identities: dict[Attack, str] = {}
        self.copied: dict[str, str] = {}  # the checkpoint of the same weights that a result is of

    def results(self) -> dict[str, Any]:
        """The content of ``results.json``, with an entry for this checkpoint, which may be empty."""
        content = self.run.read_json(RESULTS) if self.run.has(RESULTS) else {}
        results: dict[str, Any] = content if isinstance(content, dict) else {}
        if not isinstance(results.get(self.which), dict):
            results[self.which] = {}
        return results

    def score(
        self,
        attack: Attack,
        progress: Callable[[str, str, int, int, Trace], None] = lambda *_: None,
        again: bool = False,
        begun: Callable[[str, Trace], None] = lambda *_: None,
    ) -> tuple[str, Score]:
        """The score of an attack: the stored one if it is current; otherwise it is computed.

        An interrupted evaluation is resumed.

        Args:
            attack: the attack.
            progress: called after each batch with the result's name, the stage, batches done, batches to do, the trace.
            again: ignore stored results and compute the score again.
            begun: called with the result's name and the trace where there is something to compute, before it is.

        Returns:
            The name of the result and the score.
        """
        found = shares.first(lambda: self._find(attack, again))
        trace, score = found.trace.to(self.images.device), found.score
        if score is None:
            begun(found.name, trace)
            self._attack(found.name, attack, trace, progress)
            score = shares.first(lambda: self._score(found.name, attack, trace))
        if found.twin is not None:
            self.copied[found.name] = found.twin
        self.traces[found.name], self.attacks[found.name] = trace, attack
        return found.name, score

    def _find(self, attack: Attack, again: bool) -> _Found:
        """What is on record; the result of a checkpoint with the same weights is stored as this one's, too."""
        name, entry = self._place(attack)
        trace = None if again else self._read(self._file(name), attack)
        finished = trace is not None and trace.stage > len(attack.stages)
        if trace is not None and finished and entry is not None and self._same(entry, attack):
            return _Found(name, trace, entry)
        of_a_twin = None if finished else self._of_a_twin(name, attack, again)
        return of_a_twin or _Found(name, Trace.start(len(self.images)) if trace is None else trace)

    def _attack(
        self, name: str, attack: Attack, trace: Trace, progress: Callable[[str, str, int, int, Trace], None]
    ) -> None:
        """Attack from the trace on to the end, and save it now and then, and where that is interrupted."""
        path = self._file(name)
        saved = trace.seconds
        try:
            for _, stage, done, of in attack_examples(
                self.model, self.images, attack, seed=self.seed, batch_size=self.batch_size, trace=trace
            ):
                progress(name, stage, done, of, trace)
                if trace.seconds - saved > SAVE_EVERY:  # which is the same on every process
                    shares.first(lambda: self._write(path, attack, trace))
                    saved = trace.seconds
        except InputError:  # raised before the first batch
            raise
        except BaseException as error:  # save the finished batches; other processes may have ended
            before = isinstance(error, shares.Elsewhere) and trace.stage == 0  # perhaps an InputError there
            if shares.rank() == 0 and not before:
                self._write(path, attack, trace)
            raise

    def _score(self, name: str, attack: Attack, trace: Trace) -> Score:
        """The score of a finished trace; both are stored."""
        path = self._file(name)
        self._write(path, attack, trace)
        score = Score.of(
            trace,
            attack,
            data=self.data,
            seed=self.seed,
            batch_size=self.batch_size,
            weights=self.weights,
            file=str(path.relative_to(self.run.path).as_posix()),
            date=today(),
            device=device_name(self.images.device),
            versions=versions("pyautoattack", "numpy"),
        )
        self._keep(name, score)
        return score

    def worst_case(self) -> WorstCase | None:
        """The worst case of all attacks that were made on these images in the run's threat, by any command.

        None if there is none yet.
        """
        return shares.first(self._worst_case)

    def _worst_case(self) -> WorstCase | None:
        entries = self.results()[self.which]
        current = {k: v for k, v in entries.items() if score_from(v) is not None and self._current(v)}
        try:
            return worst_case(self.run.path, under_threat(current, self.usual or Threat("linf"), self.data))
        except InputError:  # a damaged file of another attack, which is made anew when it is asked for
            return None

    def _keep(self, name: str, score: Score) -> None:
        """Write a score to ``results.json``."""
        results = self.results()
        # Results for other weights are stale: the checkpoint has been replaced since.
        current = {k: v for k, v in results[self.which].items() if self._current(v)}
        current[name] = score.asdict()
        results[self.which] = current
        self.run.write_json(RESULTS, results)

    def _of_a_twin(self, name: str, attack: Attack, again: bool) -> _Found | None:
        """The score of another checkpoint with the same weights, if it is on record; its outcomes are copied."""
        results = self.results()
        for twin in self.twins if again else dict.fromkeys([*self.twins, *results]):
            if twin == self.which or not isinstance(results.get(twin), dict):
                continue
            entry = score_from(results[twin].get(name))
            trace = self._read(self.run.path / FOLDER / twin / file_name(name), attack)
            if entry is None or trace is None or trace.stage <= len(attack.stages) or not self._same(entry, attack):
                continue
            path = self._file(name)
            self._write(path, attack, trace)
            epsilon = math.nan if entry.epsilon is None else entry.epsilon  # as JSON has it
            file = str(path.relative_to(self.run.path).as_posix())
            score = dataclasses.replace(entry, epsilon=epsilon, file=file)
            self._keep(name, score)
            return _Found(name, trace, score, twin)
        return None

    def _place(self, attack: Attack) -> tuple[str, Score | None]:
        """The name of the attack's result, and the stored entry of that name, if any."""
        known = self.results()[self.which]
        name = result_name(attack, self.usual)
        entry = score_from(known.get(name))
        if entry is not None and entry.n > len(self.images):
            name = f"{name}[n={len(self.images)}]"
            entry = score_from(known.get(name))
        return name, entry

    def is_in(self, name: str, threat: Threat) -> bool:
        """Whether an attack of this store has that threat, or perturbs nothing."""
        own = self.attacks[name].threat
        return own is None or own.epsilon == 0 or own.key == threat.key

    def _current(self, entry: Any) -> bool:
        return not isinstance(entry, dict) or entry.get("weights", self.weights) in ("", self.weights)

    def _same(self, entry: Score, attack: Attack) -> bool:
        """Whether an entry is of this attack, network, images and draws."""
        threat = attack.threat
        epsilon = None if math.isnan(attack.epsilon) else attack.epsilon
        name = "" if threat is None or threat.is_ball else threat.name
        settings = (attack.name, epsilon, name, self.data, self.weights, self.seed, self.batch_size)
        of = (entry.attack, entry.epsilon, entry.threat, entry.data, entry.weights, entry.seed, entry.batch_size)
        return settings == of

    def _identity(self, attack: Attack) -> str:
        if attack in self._identities:  # the surrogates' weights are not read again for each save
            return self._identities[attack]
        surrogates = [fingerprint(stage.surrogate) for stage in attack.stages[:1] if isinstance(stage, OnSurrogate)]
        # The stages' settings, without the memory addresses in default reprs.
        description = re.sub(r" at 0x[0-9a-f]+", "", repr(list(attack.stages)))
        threat = attack.threat
        constraint = repr(attack.constraint) if threat is None or threat.is_ball else repr(threat)
        stated = {
            "attack": attack.name,
            "settings": hashlib.sha256(description.encode()).hexdigest()[:16],
            "constraint": hashlib.sha256(constraint.encode()).hexdigest()[:16],
            "epsilon": attack.epsilon,
            "stages": [stage.name for stage in attack.stages],
            "surrogates": surrogates,
            "data": self.data,
            "weights": self.weights,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }
        return self._identities.setdefault(attack, json.dumps(stated, sort_keys=True))

    def _file(self, name: str) -> Path:
        return self.run.path / FOLDER / self.which / file_name(name)

    def _read(self, path: Path, attack: Attack) -> Trace | None:
        """The trace in the file, on the CPU; None if the file is missing, damaged, or from another evaluation."""
        name = path.relative_to(self.run.path).as_posix()
        if not self.run.has(name):
            return None
        try:
            arrays = self.run.read_arrays(name)
            trace = Trace.from_arrays(arrays)
            expected = self._arrays(attack, trace)
            if arrays.keys() != expected.keys() or not all(np.array_equal(arrays[k], v) for k, v in expected.items()):
                return None
        except InputError as error:
            tell(f"{attack.name} is made anew: {error}")
            return None
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            return None
        whole = len(trace.broken) == len(self.images) and 0 <= trace.stage <= len(attack.stages) + 1
        return trace if whole else None

    def _write(self, path: Path, attack: Attack, trace: Trace) -> None:
        self.run.save_arrays(path.relative_to(self.run.path).as_posix(), self._arrays(attack, trace))

    def _arrays(self, attack: Attack, trace: Trace) -> dict[str, Any]:
        return {
            "label": self.images.y.cpu().numpy(),
            "correct": trace.correct.cpu().numpy(),
            "stages": np.array(["clean", *(stage.name for stage in attack.stages)]),
            "identity": np.array(self._identity(attack)),
            "finished": np.array(trace.stage > len(attack.stages)),
            **trace.arrays(),
        }
