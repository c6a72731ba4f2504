"""What is each process's own (batch statistics, starting weights, mistakes) and what becomes of it."""

from __future__ import annotations

from ranks import ONLY_LINUX, printed
from test_ranks_training import PROGRAM

OWN = (
    PROGRAM.split("SETTINGS = ")[0].replace("    ba.distributed.synchronise(model)\n", "")
    + '''
dist.init_process_group("gloo")
rank = dist.get_rank()


def refused(text, function):
    try:
        function()
    except (ba.InputError, shares.Elsewhere) as error:
        assert text in str(error), str(error)
        assert "\\n" not in str(error)
    else:
        raise AssertionError(text)


def same(tensors):
    """Whether all processes have the same."""
    flat = torch.cat([t.double().flatten() for t in tensors])
    return all(torch.equal(flat, other) for other in shares.gathered(flat))


with ba.distributed.together():
    # Local statistics are averaged by examples after every update, and so are those of the averaged weights.
    trainer = trained("fastat", normalised=True, average_from=1, reestimate=True)
    for epoch in trainer.epochs():
        assert same(trainer.model.state_dict().values()) and same(trainer.evaluated.state_dict().values())
    assert trainer.evaluated is not trainer.model

    # Of a process without examples nothing counts: 3 of 4 have one each.
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).double()
    ba.distributed.broadcast(model)
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    share = shares.deal([torch.arange(3)], False)[0]
    before = model[1].running_mean.clone()
    model(x[share.rows])
    ba.distributed.average_statistics(model, 0 if share.idle else len(share.rows))
    means = torch.stack([model[0](x[i:i + 1]).mean((0, 2, 3)) for i in range(3)])
    assert (model[1].running_mean - (0.9 * before + 0.1 * means.mean(0))).abs().max() < 1e-12

    # Networks that differ are noticed before the first update.
    trainer = trained("fastat")
    with torch.no_grad():
        trainer.model[0].weight += 0.1 * rank
    refused("is not the same on all" if rank == 0 else "", lambda: next(trainer.epochs()))

    # One row has no statistics of its own in a layer of vectors.
    network = lambda normalised: nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4)).double()
    refused("use --sync-batch-norm", lambda: trained("fastat"))
    vectors = network
    def network(normalised):
        ba.distributed.synchronise(model := vectors(normalised))
        return model
    next(trained("fastat").epochs())
    network = lambda normalised: nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double()
    trained("fastat")

    # In a loop of one's own that is not dealt out, a memory would not know whose rows are whose.
    problem, model = ProblemFile("atas").problem(epsilon=0.2), network(False)
    whole = ba.Batch(images.x[:4].double(), images.y[:4], torch.arange(4), examples=43)
    refused("is remembered of a batch that is not dealt out", lambda: ZeroIG().backward(problem, model, whole))
    with shares.alone():
        ZeroIG().backward(problem, model, whole)

    # A policy that remembers by itself what is not the same everywhere is named.
    class Own(ba.Zero):
        def state_dict(self):
            return {"rank": rank}

    trainer = trained("fastat")
    trainer.problem.lower.anchor = Own()
    refused("problem/lower.anchor/rank is not the same" if rank == 0 else "", trainer.state_dict)
    print("all alike", flush=True)
dist.barrier()
dist.destroy_process_group()
'''
)


@ONLY_LINUX
def test_what_is_each_process_s_own_is_made_alike_or_refused(tmp_path):
    results = printed(tmp_path, 4, OWN)
    assert all("all alike" in text for text in results)
