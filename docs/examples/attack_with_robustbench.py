"""A trained network in RobustBench's ``benchmark``: ``python docs/examples/attack_with_robustbench.py RUN``

robustbench 1.1.1 on the package index requires pyautoattack, but imports ``autoattack``, which is on GitHub only. Where
that is not installed, pyautoattack gets its name and its signature here.
"""

import sys
import types
from importlib.util import find_spec

import pyautoattack
from pyautoattack.state import EvaluationState


class AutoAttack(pyautoattack.AutoAttack):
    def __init__(self, model, *, log_path=None, **settings):
        super().__init__(model, seed=0, **settings)

    def run_standard_evaluation(self, x, y, bs=250, **more):
        return super().run_standard_evaluation(x, y, batch_size=bs, **more)[0]


if find_spec("autoattack") is None:
    sys.modules["autoattack"] = types.SimpleNamespace(AutoAttack=AutoAttack)
    sys.modules["autoattack.state"] = types.SimpleNamespace(EvaluationState=EvaluationState)

from robustbench import benchmark, data  # noqa: E402

import bilevel_at as ba  # noqa: E402
from bilevel_at.data import load_data  # noqa: E402
from bilevel_at.evaluate import evaluate  # noqa: E402

EPSILON, COUNT = 0.1, 6
run = sys.argv[1] if len(sys.argv) > 1 else "runs/fastbat-digits-seed0"  # README's first command
model = ba.load(run)  # in eval mode, from images in [0, 1] to logits
test = load_data("digits")[1][slice(0, COUNT)]
# The digits in the place of CIFAR-10; of a CIFAR-10 network leave this line out.
data._clean_dataset_loaders[data.BenchmarkDataset.cifar_10] = lambda count, *_: (test.x[:count], test.y[:count])

theirs = benchmark(model, COUNT, "cifar10", "Linf", eps=EPSILON, batch_size=250)
result = evaluate(model, test, ["clean", "autoattack"], EPSILON, checks=0)
ours = result["clean"].accuracy, result["autoattack"].accuracy
print(f"clean and AutoAttack: {theirs} by RobustBench, {ours} by this library")
