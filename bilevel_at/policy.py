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

__all__ = ["Counter", "Policy", "Schedule", "load_state", "observe", "policies", "set_epoch", "state_of"]


class Policy:
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

    Policies are found in attributes, and in lists, tuples and dictionaries there, recursively; each object once, under
    the first path that leads to it. ``root`` itself, where it is a policy, has the path ``""``.
    """
    return dict(_walk(root, "", set()))


def _walk(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Policy]]:
    if id(value) in seen:
        return
    if isinstance(value, Policy):
        seen.add(id(value))
        yield path, value
        parts: Mapping[Any, Any] = vars(value)
    elif isinstance(value, Mapping):
        parts = value
    elif isinstance(value, list | tuple):
        parts = dict(enumerate(value))
    elif path == "" and hasattr(value, "__dict__"):
        parts = vars(value)
    else:
        return
    for name, part in parts.items():
        yield from _walk(part, f"{path}.{name}" if path else str(name), seen)


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
    own = state_of(root)
    if set(state) != set(own):
        raise InputError(
            f"the state is of {', '.join(sorted(state)) or 'no policy'}; this problem keeps "
            f"{', '.join(sorted(own)) or 'none'}"
        )
    by_path = policies(root)
    for path, value in state.items():
        by_path[path].load_state_dict(value)


@dataclass
class Schedule(Policy):
    """A number that depends on the epoch, for a loss's weight or a step.

    Args:
        at: ``at(epoch, epochs)``, with epochs counted from 0.
    """

    at: Callable[[int, int], float]
    value: float = field(init=False)

    def __post_init__(self) -> None:
        self.value = self.at(0, 1)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        self.value = self.at(epoch, epochs)


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
