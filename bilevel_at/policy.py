"""What may outlive a batch: policies, how they are found, and two small clocks for them to read.

Computing (``solve``, ``hypergradient``) only reads policies. A policy changes in :meth:`Policy.observe`, which
``backward`` calls once per batch, and in :meth:`Policy.set_epoch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import InputError
from .solution import Hypergradient

__all__ = ["Composite", "Counter", "Policy", "Schedule", "load_state", "observe", "policies", "set_epoch", "state_of"]


class Composite:
    """An object whose attributes may be policies: a problem, a constraint, a policy."""


class Policy(Composite):
    """An object that may remember something from batch to batch: anchors, steps, losses, problems, solvers.

    Each method is about this object alone: its parts, found by :func:`policies`, are told by themselves. So an override
    neither calls ``super()`` nor passes anything on.
    """

    def observe(self, step: Hypergradient) -> None:
        """Learn from a training step; the only method in which training changes the policy.

        Args:
            step: what ``backward`` has computed. Anything else that is needed is this object's own state.
        """

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Called as epoch ``epoch`` of ``epochs`` (from 0) begins."""

    def state_dict(self) -> dict[str, Any]:
        """What outlives a batch: tensors and plain values only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; on resuming, after :meth:`set_epoch`."""


def policies(root: Any) -> dict[str, Policy]:
    """Every policy that ``root`` is made of, by path: ``{"lower.anchor": Remembered(...), ...}``.

    Policies are looked for in attributes, the class's own among them, and in lists, tuples and dictionaries there,
    recursively; each object once, under the first path that leads to it. ``root`` itself, where it is a policy, has the
    path ``""``.

    Raises:
        InputError: where two policies have the same path (dictionary keys that print alike).
    """
    by_path: dict[str, Policy] = {}
    for path, policy in _walk(root, "", set()):
        if path in by_path:
            raise InputError(
                f"two policies have the path {path!r}; rename one, so that a checkpoint can tell them apart"
            )
        by_path[path] = policy
    return by_path


def _walk(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Policy]]:
    if id(value) in seen:
        return
    parts: Mapping[Any, Any]
    if isinstance(value, Composite) or (path == "" and hasattr(value, "__dict__")):
        parts = _attributes(value)
    elif isinstance(value, Mapping):
        parts = value
    elif isinstance(value, list | tuple):
        parts = dict(enumerate(value))
    else:
        return
    seen.add(id(value))
    if isinstance(value, Policy):
        yield path, value
    for name, part in parts.items():
        yield from _walk(part, f"{path}.{name}" if path else str(name), seen)


def _attributes(value: Any) -> dict[str, Any]:
    """What the object has, in its dictionary, in slots and on its class, by name."""
    names = dict.fromkeys(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names.update(dict.fromkeys([slots] if isinstance(slots, str) else slots))
        names.update(dict.fromkeys(n for n, v in vars(kind).items() if isinstance(v, Composite | list | tuple | dict)))
    return {name: getattr(value, name) for name in names if not name.startswith("__") and hasattr(value, name)}


def observe(root: Any, step: Hypergradient) -> None:
    """Let every policy of ``root`` observe the step."""
    for policy in policies(root).values():
        policy.observe(step)


def set_epoch(root: Any, epoch: int, epochs: int) -> None:
    """Tell every policy of ``root`` that epoch ``epoch`` of ``epochs`` (from 0) begins."""
    for policy in policies(root).values():
        policy.set_epoch(epoch, epochs)


def state_of(root: Any) -> dict[str, Any]:
    """The state of every policy of ``root`` that has one, by path."""
    states = {path: policy.state_dict() for path, policy in policies(root).items()}
    return {path: state for path, state in states.items() if state}


def load_state(root: Any, state: Mapping[str, Any]) -> None:
    """Restore what :func:`state_of` returned.

    Raises:
        InputError: where the state is of other policies than these.
    """
    own, by_path = state_of(root), policies(root)
    # A policy may have no state before it has observed anything.
    if set(state) - set(by_path) or set(own) - set(state):
        raise InputError(
            f"the state is of {', '.join(sorted(state)) or 'no policy'}; this problem keeps "
            f"{', '.join(sorted(own)) or 'none'}"
        )
    for path, value in state.items():
        by_path[path].load_state_dict(value)


@dataclass
class Schedule(Policy):
    """A number that depends on the epoch, for a loss's weight or a step.

    Args:
        at: ``at(epoch, epochs)``, with epochs counted from 0.
    """

    at: Callable[[int, int], float]
    epoch: int = field(default=0, init=False, repr=False)
    epochs: int = field(default=1, init=False, repr=False)

    @property
    def value(self) -> float:
        """The number of the current epoch."""
        return self.at(self.epoch, self.epochs)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        self.epoch, self.epochs = epoch, epochs


@dataclass
class Counter(Policy):
    """The number of ``backward`` calls within the epoch: every n-th batch something may be different."""

    count: int = field(default=0, init=False)

    def observe(self, step: Hypergradient) -> None:
        self.count += 1

    def set_epoch(self, epoch: int, epochs: int) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
