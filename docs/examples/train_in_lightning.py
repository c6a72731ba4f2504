"""Fast-BAT in Lightning, by manual optimisation: ``python docs/examples/train_in_lightning.py``"""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import bilevel_at as ba
from bilevel_at.data import load_data
from bilevel_at.models import build_model
from bilevel_at.problems import fastbat
from bilevel_at.solvers import HessianFreeKKT


class Robust(lightning.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.automatic_optimization = False  # the solver takes the place of loss.backward()
        self.network, self.generator = network, torch.Generator().manual_seed(0)
        self.problem, self.solver = fastbat.problem(0.1, step=1.0), HessianFreeKKT()

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=0.05, momentum=0.9)

    def on_train_epoch_start(self):
        self.problem.set_epoch(self.current_epoch, self.trainer.max_epochs)  # for schedules and what is remembered

    def training_step(self, batch, number):
        self.optimizers().zero_grad()
        step = self.solver.backward(self.problem, self.network, ba.Batch(*batch), self.generator)
        self.optimizers().step()
        self.log("loss", step.loss)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["problem"] = self.problem.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.problem.load_state_dict(checkpoint["problem"])


torch.manual_seed(0)
train, test = load_data("digits")
module = Robust(build_model("small_cnn", train.shape, train.classes, train))
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = lightning.Trainer(max_epochs=4, accelerator="cpu", **quiet)
trainer.fit(module, DataLoader(TensorDataset(train.x, train.y), batch_size=64))
accuracy = (module.network.eval()(test.x).argmax(1) == test.y).float().mean().item()
print(f"clean accuracy {accuracy:.1%}")
