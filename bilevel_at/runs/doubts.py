"""``checks.json``: the measurements of each network, and the warnings that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..constraints import Constraint
from ..data import ImageSet
from ..errors import InputError
from ..evaluate.checks import check, compare_traces, findings
from ..evaluate.result import Finding
from ..evaluate.threat import Threat
from .directory import CHECKS, RunDir
from .evaluations import Store

__all__ = ["record_checks"]


def record_checks(
    run: RunDir,
    store: Store,
    images: ImageSet,
    space: Constraint,
    examples: int,
    *,
    key: str | None = None,
    again: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Finding]:
    """Check the store's network for gradient masking, and write the result to ``checks.json``.

    Stored comparisons are reused if weights and images are the same; stored measurements if, besides, every setting is
    the same or ``examples`` is 0.

    Args:
        run: the directory.
        store: the network's results; the traces in it are compared with each other.
        images: the images from which the sample is drawn.
        space: the constraint of the checks' attacks; if it is not a ball, checks that need an attack are skipped.
        examples: the number of images to measure on; 0 measures nothing new.
        key: the name of the entry; the checkpoint's name by default.
        again: measure again, even if the measurements are on record.
        progress: called with the name of each check before it starts.

    Returns:
        The warnings.
    """
    key = store.which if key is None else key
    known = _object(run)
    entry = _part(known, key)
    images_and_draws = {"data": store.data, "seed": store.seed}
    of = {"weights": store.weights, **images_and_draws, "examples": examples}
    threat = Threat.of(space)
    of |= {"norm": threat.norm, "epsilon": threat.epsilon} | ({} if threat.is_ball else {"threat": threat.name})
    before = _part(entry, "of")
    same = (before.get("weights"), before.get("data")) == (store.weights, store.data)
    if not examples and same:
        of = before
    measured = _part(entry, "network") if before == of and not again else {}
    if examples and not measured:
        few = images.sample(examples)
        measured, _ = check(store.model, few, space, seed=store.seed, batch_size=store.batch_size, progress=progress)
    compared = _part(entry, "compared") if same else {}
    traces = {name: trace for name, trace in store.traces.items() if store.is_in(name, threat)}
    compared = {**compared, **compare_traces(traces, store.attacks)}
    reasons = [*findings(measured), *findings(compared)]
    known[key] = {
        "warnings": [{"name": reason.name, "message": reason.message} for reason in reasons],
        "measured": {**measured, **compared},
        "network": measured,
        "compared": compared,
        "of": of,
    }
    run.write_json(CHECKS, known)
    return reasons


def _object(run: RunDir) -> dict[str, Any]:
    """The content of ``checks.json``; empty if the file is missing or damaged, and then it is written again."""
    try:
        content = run.read_json(CHECKS) if (run.path / CHECKS).exists() else {}
        for entry in content.values():
            findings(_part(entry, "network")), findings(_part(entry, "compared"))
    except (AttributeError, InputError, KeyError, TypeError, ValueError):
        return {}
    return dict(content)


def _part(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = entry.get(name)
    return part if isinstance(part, dict) else {}
