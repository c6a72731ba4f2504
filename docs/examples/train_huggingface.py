"""A vision transformer of Hugging Face, whose output has ``.logits``: ``python docs/examples/train_huggingface.py``"""

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import bilevel_at as ba
from bilevel_at.data import load_data
from bilevel_at.evaluate import evaluate
from bilevel_at.problems import fastbat
from bilevel_at.solvers import HessianFreeKKT


class Logits(nn.Module):
    """From images in [0, 1] to logits: all that attacks, losses and evaluation ask of a network."""

    def __init__(self, network, mean=0.5, std=0.5):  # of its image processor, image_mean and image_std
        super().__init__()
        self.network, self.mean, self.std = network, mean, std

    def forward(self, x):
        return self.network(pixel_values=(x - self.mean) / self.std).logits


torch.manual_seed(0)
train, test = load_data("digits")
config = ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=2,
    num_channels=1, num_labels=10, attn_implementation="eager",  # fused attention has no second derivative
)  # fmt: skip
model = Logits(ViTForImageClassification(config))
problem, solver = fastbat.problem(0.05, step=0.5), HessianFreeKKT()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(5):
    for rows in torch.randperm(len(train)).split(64):
        optimizer.zero_grad()
        step = solver.backward(problem, model, ba.Batch(train.x[rows], train.y[rows]))
        optimizer.step()
result = evaluate(model.eval(), test, ["clean", "pgd-10-1"], 0.05, checks=0)
print(f"{result}\nimplicit term / direct gradient in the last step: {step.implicit_norm / step.direct_norm:.1e}")
