"""What may outlive a batch: policies, how they are found, and two small clocks for them to read.

Computing (``solve``, ``hypergradient``) only reads policies. A policy changes in :meth:`Policy.observe`, which
``backward`` calls once per batch, and in :meth:`Policy.set_epoch` and :meth:`Policy.set_step`, its clocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import InputError, finite, one_of
from .solution import Hypergradient

__all__ = [
    "Composite",
    "Counter",
    "Number",
    "Policy",
    "Schedule",
    "checked",
    "last_number",
    "load_state",
    "number",
    "observe",
    "policies",
    "set_epoch",
    "set_step",
    "state_of",
]


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

    def set_step(self, step: int, steps: int) -> None:
        """Called before update ``step`` of all the ``steps`` (from 0) that training makes."""

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


def _attributes(value: object) -> dict[str, Any]:
    """What the object has, in its dictionary, in slots and on its class, by name."""
    own: dict[str, Any] = getattr(value, "__dict__", {})
    attributes = {name: part for name, part in own.items() if not name.startswith("__")}
    kind: Any = type(value)
    for name in _names_of_class(kind, sum(len(base.__dict__) for base in kind.__mro__)):
        if name not in attributes and hasattr(value, name):
            attributes[name] = getattr(value, name)
    return attributes


@functools.cache  # the walk is made in every training step
def _names_of_class(kind: Any, size: int) -> tuple[str, ...]:
    """The names of slots, and of what may be or hold policies, on a class whose namespaces have ``size`` names."""
    names: dict[str, None] = {}
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        names.update(dict.fromkeys([slots] if isinstance(slots, str) else slots))
        names.update(dict.fromkeys(n for n, v in vars(base).items() if isinstance(v, Composite | list | tuple | dict)))
    return tuple(name for name in names if not name.startswith("__"))


def observe(root: Any, step: Hypergradient) -> None:
    """Let every policy of ``root`` observe the step."""
    for policy in policies(root).values():
        policy.observe(step)


def set_epoch(root: Any, epoch: int, epochs: int) -> None:
    """Tell every policy of ``root`` that epoch ``epoch`` of ``epochs`` (from 0) begins."""
    for policy in policies(root).values():
        policy.set_epoch(epoch, epochs)


def set_step(root: Any, step: int, steps: int) -> None:
    """Tell every policy of ``root`` that update ``step`` of ``steps`` (from 0) is next."""
    for policy in policies(root).values():
        policy.set_step(step, steps)


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


@dataclass(eq=False)
class Schedule(Policy):
    """A number that depends on time: for a loss's weight, a step, a radius.

    ``k * schedule`` and ``schedule / k`` are schedules too, so that what is a multiple of ε follows it.

    Args:
        at: ``at(epoch, epochs)``, or with ``by="step"`` ``at(step, steps)``, each counted from 0.
        by: "epoch", or "step" for the updates of the whole training.
    """

    at: Callable[[int, int], float]
    by: Literal["epoch", "step"] = "epoch"
    now: int = field(default=0, init=False, repr=False)
    total: int = field(default=1, init=False, repr=False)

    def __post_init__(self) -> None:
        one_of("by", self.by, ("epoch", "step"))

    @property
    def value(self) -> float:
        """The number of the current epoch or step."""
        return self.at(self.now, self.total)

    @property
    def last(self) -> float:
        """The number of the last epoch or step."""
        return self.at(self.total - 1, self.total)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        if self.by == "epoch":
            self.now, self.total = epoch, epochs

    def set_step(self, step: int, steps: int) -> None:
        if self.by == "step":
            self.now, self.total = step, steps

    def __mul__(self, factor: float) -> Schedule:
        at, factor = self.at, finite("the factor of a schedule", factor)
        scaled = Schedule(lambda now, total: factor * at(now, total), self.by)
        scaled.now, scaled.total = self.now, self.total
        return scaled

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Schedule:
        return self * (1 / divisor)


Number = Schedule | float
"""A number, or one that depends on time."""


def number(value: Number) -> float:
    """The number now."""
    return value.value if isinstance(value, Schedule) else value


def last_number(value: Number) -> float:
    """The number that a schedule ends at, for settings that are chosen by it once."""
    return value.last if isinstance(value, Schedule) else value


def checked(check: Callable[[str, Any], float], name: str, value: Number) -> Number:
    """``check(name, value)`` of a number; a schedule as it is, whose numbers are checked as they are read."""
    return value if isinstance(value, Schedule) else check(name, value)


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
