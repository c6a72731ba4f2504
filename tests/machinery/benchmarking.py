"""What the tests of the benchmark scripts share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def small_data():
    """``data/cifar10.npz`` with 60 training and 12 test images of noise, 8×8, in five classes."""
    g = np.random.default_rng(0)
    Path("data").mkdir()
    np.savez(
        "data/cifar10.npz",
        x_train=g.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8),
        y_train=np.arange(60) % 5,
        x_test=g.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8),
        y_test=np.arange(12) % 5,
    )


def script(name):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
