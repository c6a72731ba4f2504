"""Hypothesis profiles: ``ci``, derandomised, is the default; ``pytest --hypothesis-profile thorough`` looks further."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile(
    "ci", derandomize=True, max_examples=50, deadline=None, suppress_health_check=SLOW_IS_FINE, print_blob=True
)
settings.register_profile(
    "thorough", max_examples=400, deadline=None, suppress_health_check=SLOW_IS_FINE, print_blob=True
)
settings.load_profile("ci")
torch.set_num_threads(1)  # tiny networks: threads only get in each other's way, and in that of pytest -n


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
