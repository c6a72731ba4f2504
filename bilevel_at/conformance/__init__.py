"""Small bilevel problems with known hypergradients, run through this library's solvers and through other libraries'.

``python -m bilevel_at.conformance`` prints relative error against products used. A problem (``problems.py``) knows its
solution and its hypergradient in closed form; a library (``ours.py``, ``with_*.py``) is given the solution and returns
its hypergradient, so that only the differentiation is compared; ``measure.py`` runs them all.

No library but this one is imported before :func:`~bilevel_at.conformance.measure.measure` asks for it.
"""

from __future__ import annotations
