"""A trained network under AutoAttack, called directly: ``python docs/examples/attack_with_pyautoattack.py RUN``"""

import sys

from pyautoattack import AutoAttack

import bilevel_at as ba
from bilevel_at.data import load_data
from bilevel_at.evaluate import evaluate

EPSILON, COUNT = 0.1, 40
run = sys.argv[1] if len(sys.argv) > 1 else "runs/fastbat-digits-seed0"  # README's first command
model = ba.load(run)  # in eval mode, from images in [0, 1] to logits
test = load_data("digits")[1][slice(0, COUNT)]

attack = AutoAttack(model, norm="Linf", eps=EPSILON, version="custom", attacks=["apgd-ce", "apgd-t"], seed=0)
attacked, answers = attack.run_standard_evaluation(test.x, test.y)

theirs = answers == test.y  # image by image
result = evaluate(model, test, ["apgd-ce", "apgd-t"], EPSILON, checks=0)
ours = result.correct("apgd-ce") & result.correct("apgd-t")
print(f"withstand both: {theirs.float().mean():.1%} by pyautoattack, {ours.float().mean():.1%} by this library")
