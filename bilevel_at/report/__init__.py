"""One page about runs and the results of their evaluation.

Importing this package is light: ``python -m bilevel_at.report --help`` does, and needs nothing that draws.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import report

__all__ = ["report"]


def __getattr__(name: str) -> Any:
    if name != "report":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .build import report

    return report
