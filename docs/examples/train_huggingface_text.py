"""A text classifier of Hugging Face, attacked in its embeddings: ``python docs/examples/train_huggingface_text.py``"""

import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

import bilevel_at as ba
from bilevel_at.solvers import HessianFreeKKT


class OnEmbeddings(ba.CrossEntropy):
    """δ is added to the embeddings of the tokens."""

    def forward(self, model, batch, delta):
        return model(inputs_embeds=batch.x + delta, attention_mask=batch.more["mask"]).logits


torch.manual_seed(0)
tokens, mask = torch.randint(50, (512, 11)), torch.ones(512, 11)
labels = (tokens[:, 0] < 25).long()
config = DistilBertConfig(
    vocab_size=50, dim=32, hidden_dim=64, n_layers=1, n_heads=4, max_position_embeddings=11, dropout=0.0,
    attention_dropout=0.0, attn_implementation="eager",  # fused attention has no second derivative
)  # fmt: skip
model = DistilBertForSequenceClassification(config)
embed = model.get_input_embeddings().requires_grad_(False)
loss = OnEmbeddings()
lower = ba.Linearized(ba.minus(loss), ba.L2Ball(0.015), anchor="zero", direction="normalized", step=0.015)
problem, solver = ba.BilevelProblem(ba.UpperProblem(loss), lower), HessianFreeKKT()
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
for _ in range(10):
    for rows in torch.randperm(400).split(50):
        optimizer.zero_grad()
        step = solver.backward(problem, model, ba.Batch(embed(tokens[rows]), labels[rows], mask=mask[rows]))
        optimizer.step()

held_out = ba.Batch(embed(tokens[400:]), labels[400:], mask=mask[400:])
delta = lower.solve(model.eval(), held_out).delta
clean, robust = (
    (loss.forward(model, held_out, d).argmax(1) == held_out.y).float().mean().item() for d in (0 * delta, delta)
)
chance = held_out.y.float().mean().item()
print(f"held out: {clean:.1%} right, {robust:.1%} under the attack; the larger class has {max(chance, 1 - chance):.1%}")
