"""A trained network attacked by the Adversarial Robustness Toolbox: ``python docs/examples/attack_with_art.py RUN``"""

import sys

import torch
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from art.estimators.classification import PyTorchClassifier

import bilevel_at as ba
from bilevel_at.data import load_data
from bilevel_at.evaluate import evaluate

EPSILON = 0.1
run = sys.argv[1] if len(sys.argv) > 1 else "runs/fastbat-digits-seed0"  # README's first command
model = ba.load(run)  # in eval mode, from images in [0, 1] to logits
_, test = load_data("digits")

classifier = PyTorchClassifier(
    model, torch.nn.CrossEntropyLoss(), test.shape, test.classes, clip_values=(0.0, 1.0), device_type="cpu"
)
attack = ProjectedGradientDescentPyTorch(
    classifier, eps=EPSILON, eps_step=EPSILON / 4, max_iter=50, num_random_init=1, batch_size=len(test), verbose=False
)
attacked = attack.generate(test.x.numpy(), test.y.numpy())

theirs = (classifier.predict(attacked).argmax(1) == test.y.numpy()).mean()
ours = evaluate(model, test, ["pgd-50-1"], EPSILON, checks=0)["pgd-50-1"].accuracy
print(f"accuracy under PGD of 50 steps: {theirs:.1%} by ART, {ours:.1%} by this library")
