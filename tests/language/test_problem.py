"""Problems are objects that can be pickled and copied."""

from __future__ import annotations

import torch
from networks import batch_of, dense

from bilevel_at.problems import fastat, fastbat


def test_problems_can_be_pickled_and_copied():
    import pickle

    for problem in (fastat.problem(), fastbat.problem()):
        again = pickle.loads(pickle.dumps(problem))
        a, b = (
            p.lower.solve(dense(6, 5, 3), batch_of(3, 6), generator=torch.Generator().manual_seed(0))
            for p in (problem, again)
        )
        assert torch.equal(a.delta, b.delta)
