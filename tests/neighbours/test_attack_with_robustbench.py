"""RobustBench's benchmark() gives a loaded network the accuracies that evaluate() gives."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

# Not importorskip: robustbench's own import fails where something else is missing, which is to be seen.
MISSING = [
    name
    for name in ("robustbench", "geotorch", "torchdiffeq", "pandas", "timm", "gdown", "pkg_resources")
    if not find_spec(name)
]


@pytest.mark.skipif(
    bool(MISSING),
    reason=f"{', '.join(MISSING)} not installed: docs/examples/requirements.txt, and pip install --no-deps robustbench",
)
@pytest.mark.filterwarnings("ignore")  # of deprecated imports
def test_benchmark_takes_a_trained_network(example, run):
    found = example("attack_with_robustbench", run)
    assert found["theirs"] == pytest.approx(found["ours"], abs=1e-6)
    assert 0 < found["ours"][1] <= found["ours"][0]
