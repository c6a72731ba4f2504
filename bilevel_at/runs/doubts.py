"""``checks.json``: the measurements of each network, and the warnings that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import shares
from ..constraints import Constraint
from ..data import ImageSet
from ..evaluate.active import active_findings, active_test, testable
from ..evaluate.attacks import Attack
from ..evaluate.checks import check, compare_traces, findings
from ..evaluate.result import Finding
from ..evaluate.threat import Threat
from .directory import CHECKS, RunDir
from .evaluations import Store
from .manifest import tell

__all__ = ["record_checks"]


def record_checks(
    run: RunDir,
    store: Store,
    images: ImageSet,
    space: Constraint,
    examples: int,
    *,
    active: int = 0,
    attacks: Sequence[Attack] = (),
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
        active: the number of images of the active test of the attacks; 0 for none.
        attacks: that the active test tests, as far as they are in ``space``.
        key: the name of the entry; the checkpoint's name by default.
        again: measure again, even if the measurements are on record.
        progress: called with the name of each check before it starts.

    Returns:
        The warnings.
    """
    key = store.which if key is None else key
    known = shares.first(lambda: _object(run))
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
    tested = _tested(_part(entry, "active"), store, images, space, active, attacks, same, again, progress)
    reasons += active_findings(tested) if tested else []
    known[key] = {
        "warnings": [{"name": reason.name, "message": reason.message} for reason in reasons],
        "measured": {**measured, **compared, **({"active": _shares(tested)} if tested else {})},
        "network": measured,
        "compared": compared,
        **({"active": tested} if tested else {}),
        "of": of,
    }
    shares.first(lambda: run.write_json(CHECKS, known))
    return reasons


def _tested(
    known: dict[str, Any],
    store: Store,
    images: ImageSet,
    space: Constraint,
    active: int,
    attacks: Sequence[Attack],
    same: bool,
    again: bool,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """The record of the active test: what is on record of the same network, images and set, and what is new."""
    threat = Threat.of(space)
    count = active or _part(known, "of").get("images")
    of = {"images": count, "seed": store.seed, "threat": str(threat), "weights": store.weights, "data": store.data}
    before = known if same and known.get("of") == of else {}
    if not active:
        return before
    shares = {} if again else _part(before, "found")
    left = [attack for attack in testable(attacks, space) if attack.name not in shares]
    if before and not left:
        return before
    result = active_test(store.model, images.sample(active), space, left, seed=store.seed, progress=progress).asdict()
    return {**result, "found": {**shares, **result["found"]}, "of": of}


def _shares(tested: Mapping[str, Any]) -> dict[str, Any]:
    return {"planted": tested["planted"], "random": tested["random"], **tested["found"]}


def _object(run: RunDir) -> dict[str, Any]:
    """The content of ``checks.json``; empty if the file is missing or damaged, and then it is written again."""
    try:
        content = run.read_json(CHECKS) if run.has(CHECKS) else {}
        for entry in content.values():
            findings(_part(entry, "network")), findings(_part(entry, "compared"))
            if "active" in entry:
                active_findings(entry["active"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # InputError is a ValueError
        tell(f"{run.path / CHECKS} is written anew: {error}")
        return {}
    return dict(content)


def _part(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = entry.get(name)
    return part if isinstance(part, dict) else {}
