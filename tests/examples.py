"""How many random examples a property is tried on."""

from __future__ import annotations

from hypothesis import settings


def examples(share: float) -> settings:
    """That share of the profile's examples: a wrong equation shows on nearly every one of them."""
    return settings(max_examples=max(1, round(share * settings().max_examples)))
