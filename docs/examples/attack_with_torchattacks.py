"""A trained network attacked by torchattacks: ``python docs/examples/attack_with_torchattacks.py RUN``

torchattacks pins requests 2.25 and with it urllib3 1.26, which other packages refuse: ``pip install --no-deps
torchattacks``, which has what it needs where this library is installed but for requests.
"""

import sys

import torchattacks

import bilevel_at as ba
from bilevel_at.data import load_data
from bilevel_at.evaluate import evaluate

EPSILON = 0.1
run = sys.argv[1] if len(sys.argv) > 1 else "runs/fastbat-digits-seed0"  # README's first command
model = ba.load(run)  # in eval mode, from images in [0, 1] to logits
_, test = load_data("digits")

attacked = torchattacks.PGD(model, eps=EPSILON, alpha=EPSILON / 4, steps=50)(test.x, test.y)

theirs = (model(attacked).argmax(1) == test.y).float().mean().item()
ours = evaluate(model, test, ["pgd-50-1"], EPSILON, checks=0)["pgd-50-1"].accuracy
print(f"accuracy under PGD of 50 steps: {theirs:.1%} by torchattacks, {ours:.1%} by this library")
