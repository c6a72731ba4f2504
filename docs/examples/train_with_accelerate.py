"""Fast-BAT's implicit gradient in processes of accelerate, which train as one would:

torchrun --nproc-per-node 2 docs/examples/train_with_accelerate.py

(``accelerate launch --cpu`` starts one process unless it is given MPI. On GPUs take ``accelerate launch``, and leave
out ``cpu=True``.) The network is not prepared: ``accelerator.prepare(model)`` would wrap it in DistributedDataParallel,
whose hooks do not see hypergradients, and which solvers refuse. Gradients are reduced by ``ba.distributed`` instead.
"""

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader, TensorDataset

import bilevel_at as ba
from bilevel_at.data import load_data
from bilevel_at.models import build_model
from bilevel_at.solvers import HessianFreeKKT

# The batches of one process are split, so that the batch size below is that of all processes together.
accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
train, test = load_data("digits")
# Fast-BAT's attacker from a start that is not drawn: draws would be each process's own.
lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.1), anchor="zero", direction="taylor", step=1.0)
problem, solver = ba.BilevelProblem(ba.UpperProblem(), lower), HessianFreeKKT()

torch.manual_seed(0)
model = build_model("small_cnn", train.shape, train.classes, train).double().to(accelerator.device)
ba.distributed.broadcast(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
order = torch.Generator().manual_seed(0)
shuffled = DataLoader(TensorDataset(train.x.double(), train.y), 64, shuffle=True, drop_last=True, generator=order)
optimizer, loader = accelerator.prepare(optimizer, shuffled)

for _ in range(4):
    for x, y in loader:
        optimizer.zero_grad()
        step = solver.backward(problem, model, ba.Batch(x, y))
        ba.distributed.reduce_gradients(model, len(x))
        optimizer.step()

accuracy = (model.eval()(test.x.double()).argmax(1) == test.y).double().mean().item()
weights = sum(p.abs().sum().item() for p in model.parameters())
accelerator.print(f"{accelerator.num_processes} processes: clean accuracy {accuracy:.1%}, weights {weights:.10f}")
