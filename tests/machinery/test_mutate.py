"""Every mutation of tests/mutate.py is of text that is there, once; the script itself takes minutes."""

from __future__ import annotations

import pytest
from mutate import MUTATIONS
from running import ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[name for name, *_ in MUTATIONS])
def test_what_is_to_be_broken_is_there(mutation):
    _, file, before, after, tests = mutation
    assert (ROOT / file).read_text(encoding="utf-8").count(before) == 1 and before != after
    assert all((ROOT / test.split("::")[0]).exists() for test in tests)
