"""A network of timm by its name, trained, loaded and evaluated: ``python docs/examples/train_timm.py``

On the command line: ``python -m bilevel_at.run fastbat --model timm:resnet10t --epochs 2``
"""

import timm
import torch

import bilevel_at as ba
from bilevel_at import run
from bilevel_at.data import load_data
from bilevel_at.evaluate import evaluate
from bilevel_at.models import build_model

NAME = "resnet10t"
few = ["--epochs", "2", "--examples", "400", "--test-examples", "60", "--attacks", "clean", "--select", "pgd-2-1"]
run.run(["fastbat", "--model", f"timm:{NAME}", "--out", "runs/timm", *few])
model = ba.load("runs/timm", "last")  # normalises images in [0, 1], and returns logits
_, test = load_data("digits")
accuracy = evaluate(model, test, ["clean"], checks=0)["clean"].accuracy

# Beside timm's own: the same network behind a normalisation.
torch.manual_seed(0)
ours = build_model(f"timm:{NAME}", (3, 32, 32), 10).eval()
torch.manual_seed(0)
theirs = timm.create_model(NAME, num_classes=10, in_chans=3).eval()
x = torch.rand(4, 3, 32, 32)
same = torch.equal(ours(x), theirs((x - ours.mean) / ours.std))
print(f"accuracy {accuracy:.1%}; the same logits as timm's own: {same}")
