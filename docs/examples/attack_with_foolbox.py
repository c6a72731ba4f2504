"""A trained network attacked by foolbox: ``python docs/examples/attack_with_foolbox.py runs/fastbat-digits-seed0``"""

import sys

import foolbox

import bilevel_at as ba
from bilevel_at.data import load_data
from bilevel_at.evaluate import evaluate

EPSILON = 0.1
run = sys.argv[1] if len(sys.argv) > 1 else "runs/fastbat-digits-seed0"  # README's first command
model = ba.load(run)  # in eval mode, from images in [0, 1] to logits
_, test = load_data("digits")

attack = foolbox.attacks.LinfPGD(abs_stepsize=EPSILON / 4, steps=50)
network = foolbox.PyTorchModel(model, bounds=(0, 1))
_, attacked, success = attack(network, test.x, test.y, epsilons=EPSILON)

theirs = 1 - success.float().mean().item()
ours = evaluate(model, test, ["pgd-50-1"], EPSILON, checks=0)["pgd-50-1"].accuracy
print(f"accuracy under PGD of 50 steps: {theirs:.1%} by foolbox, {ours:.1%} by this library")
