"""Low-rank adapters of PEFT on a trained network: ``python docs/examples/train_with_lora.py RUN``

Solvers differentiate in the parameters that require gradients: the adapters. The others stay as they are.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model

import bilevel_at as ba
from bilevel_at.data import load_data
from bilevel_at.evaluate import evaluate
from bilevel_at.problems import fastbat
from bilevel_at.solvers import HessianFreeKKT

EPSILON = 0.2
train, test = load_data("digits")
run = sys.argv[1] if len(sys.argv) > 1 else "runs/fastbat-digits-seed0"  # README's first command
base = ba.load(run)
start = evaluate(base, test, ["pgd-10-1"], EPSILON, checks=0)["pgd-10-1"].accuracy

layers = [name for name, module in base.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
torch.manual_seed(0)
model = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules=layers))
problem, solver = fastbat.problem(EPSILON, step=1.0), HessianFreeKKT()
adapters = [p for p in model.parameters() if p.requires_grad]
frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
optimizer = torch.optim.Adam(adapters, lr=3e-3)
for _ in range(5):
    for rows in torch.randperm(len(train)).split(64):
        optimizer.zero_grad()
        step = solver.backward(problem, model, ba.Batch(train.x[rows], train.y[rows]))
        optimizer.step()

end = evaluate(model.eval(), test, ["pgd-10-1"], EPSILON, checks=0)["pgd-10-1"].accuracy
kept = all(torch.equal(model.get_parameter(name), p) for name, p in frozen.items())
print(f"{sum(p.numel() for p in adapters):,} parameters trained, others as they were: {kept}")
print(f"accuracy under PGD of 10 steps: {start:.1%} → {end:.1%}")
