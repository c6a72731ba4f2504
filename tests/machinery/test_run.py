"""The run command: what it shows, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from marks import fast
from running import SHORT, complaint, npz, run, same, unchecked, weights

import bilevel_at as ba
from bilevel_at import figures
from bilevel_at.data import load_data
from bilevel_at.evaluate import Attack
from bilevel_at.train import Trainer

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_a_run_leaves_what_the_contract_says(drawn):
    run("problems/fastbat.py", *SHORT[2:], "--epochs", 2, "--epsilon", "8/255", "--out", "out")
    names = {
        "config.json",
        "metrics.jsonl",
        "history.npz",
        "results.json",
        "evaluation",
        "last.pt",
        "best.pt",
        "figures",
        "manifest.json",
    }
    names |= {f"{name}-before.{kind}" for name, kind in (("last", "pt"), ("best", "pt"), ("history", "npz"))}
    names |= {"metrics-before.jsonl", "manifest-before.json"}
    assert {p.name for p in Path("out").iterdir()} == names
    assert {p.name for p in Path("out/figures").iterdir()} == {"curves.png", "examples.png"}
    metrics = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [m["epoch"] for m in metrics] == [1, 2]
    assert metrics[0]["implicit_ratio"] > 0 and metrics[1]["lr"] < metrics[0]["lr"] + 0.1
    config = json.loads(Path("out/config.json").read_text())
    assert config["problem"]["epsilon"] == pytest.approx(8 / 255) and config["problem"]["step"] == 20
    assert config["solver"]["ig_weight"] == pytest.approx(0.1 / 20)
    assert config["versions"]["torch"] == torch.__version__

    for which in ("best", "last"):
        model = ba.load("out", which)
        assert not model.training
        assert model(torch.rand(3, 1, 8, 8)).shape == (3, 10)


def test_the_pictures_are_of_the_attack_that_was_made(monkeypatch):
    """No image is attacked again to be drawn, unless the figure is gone, and the result of a command before."""
    made, drawn = [], []
    perturb, examples = Attack.perturb, figures.examples

    def counted(attack, *args):
        made.append(attack.name)
        return perturb(attack, *args)

    def seen(model, images, attack, path, attacked):
        drawn.append(attacked)
        examples(model, images, attack, path, attacked)

    monkeypatch.setattr(Attack, "perturb", counted)
    monkeypatch.setattr(figures, "examples", seen)
    run("problems/fgsm.py", *SHORT, "--out", "out")
    assert made == [] and drawn[0].shape == (8, 1, 8, 8) and Path("out/figures/examples.png").exists()
    wrong = ba.load("out")(drawn[0]).argmax(1) != load_data("digits")[1].sample(60).y[:8]
    with np.load("out/evaluation/best/pgd-2-1.npz") as stored:
        assert wrong.tolist() == (~stored["correct"][:8]).tolist()
    run("problems/fgsm.py", *SHORT, "--out", "out", "--resume")
    assert made == [] and len(drawn) == 1
    Path("out/figures/examples.png").unlink()
    run("problems/fgsm.py", *SHORT, "--out", "out", "--resume")
    assert made == ["pgd-2-1"] and drawn[1] is None


SMALL = ["--examples", 200, "--test-examples", 60]


def test_what_is_shown_and_which_epoch_is_best(capsys):
    run("problems/fastbat.py", "--epochs", 4, *SMALL, "--select", "pgd-2-1", "--out", "out")
    shown = capsys.readouterr().out
    assert "180 training, 20 held-out, 60 test images" in " ".join(shown.split())
    for epoch in range(1, 5):
        assert re.search(rf"epoch {epoch}/4  loss [\d.]+  held-out clean [\d.]+%  pgd-2-1 [\d.]+%", shown)
    metrics = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    best = max(metrics, key=lambda m: (m["robust"], m["clean"], m["epoch"]))["epoch"]
    assert torch.load("out/best.pt", weights_only=True)["epochs"] == best
    results = json.loads(Path("out/results.json").read_text())
    for which, epoch in (("best", best), ("last", 4)):
        cells = [f"{100 * results[which][name]['accuracy']:.1f}%" for name in ("clean", "fgsm", "pgd-50-10")]
        assert re.search(rf"{which} \({epoch}\)\W+{cells[0]}\W+{cells[1]}\W+{cells[2]}", shown)
        # the table is that of the checkpoint, evaluated anew
        from bilevel_at.data import load_data
        from bilevel_at.evaluate import attack_from_name, evaluate

        test = load_data("digits")[1].sample(60)
        again = evaluate(ba.load("out", which), test, [attack_from_name("pgd-50-10", 0.2)])
        assert again["pgd-50-10"].accuracy == results[which]["pgd-50-10"]["accuracy"]


def test_bfloat16_autocast():
    run("problems/fastbat.py", *SHORT[2:], "--epochs", 2, "--precision", "bfloat16", "--out", "half")
    run("problems/fastbat.py", *SHORT[2:], "--epochs", 2, "--out", "single")
    lines = [json.loads(Path(out, "metrics.jsonl").read_text().splitlines()[-1]) for out in ("half", "single")]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=0.02) and lines[0]["loss"] != lines[1]["loss"]
    assert all(t.dtype == torch.float32 for t in weights("half").values())


def test_averaged_weights_are_what_is_kept():
    run("problems/fastat.py", *SHORT[2:], "--epochs", 2, "--ema", 0.9, "--accumulate", 2, "--out", "out")
    state = torch.load("out/last.pt", weights_only=True)
    loaded = ba.load("out", "last").state_dict()
    assert same(loaded, state["average"]) and not same(loaded, state["model"])
    run("problems/fastat.py", *SHORT[2:], "--epochs", 1, "--ema", 0.9, "--accumulate", 2, "--out", "one")
    assert "was started with ema = 0.9, and is resumed with 0.0" in complaint(
        "problems/fastat.py", *SHORT[2:], "--epochs", 1, "--accumulate", 2, "--out", "one", "--resume"
    )


def test_catastrophic_overfitting_is_said_and_the_weights_before_it_are_kept(monkeypatch, capsys):
    """Held-out robust accuracy is made to collapse in epoch 3; the rest of the run is real."""
    robust, seen = iter([0.3, 0.4, 0.05, 0.02]), []

    def measured(self):
        for line, value in zip(epochs(self), robust, strict=True):
            seen.append({k: v.clone() for k, v in self.model.state_dict().items()})
            yield dataclasses.replace(line, robust=value, train=0.1 * line.epoch)

    epochs = Trainer.epochs
    monkeypatch.setattr(Trainer, "epochs", measured)
    run("problems/fgsm.py", "--epochs", 4, *SHORT[2:], "--out", "out")
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        shown.count("catastrophic overfitting in epoch 3: held-out pgd-2-1 accuracy is 5.0% after 40.0% in epoch 2")
        == 2
    )
    assert "went from 20.0% to 30.0%; last_good.pt keeps epoch 2" in shown
    assert same(ba.load("out", "last_good").state_dict(), seen[1]) and same(
        ba.load("out", "last").state_dict(), seen[3]
    )
    results = json.loads(Path("out/results.json").read_text())
    assert set(results) == {"best", "last", "last_good"} and re.search(r"last good \(2\)", shown)


@pytest.mark.parametrize("augment", fast(["none", "crop-flip"], ["crop-flip"]))
def test_the_user_s_own_images(augment):
    run("problems/atas.py", "--data", npz(), "--epochs", 2, "--augment", augment, "--attacks", "clean", "--out", "out")
    config = json.loads(Path("out/config.json").read_text())
    assert config["shape"] == [3, 8, 8] and config["classes"] == 3
    x = np.zeros((60, 12, 12), dtype=np.float32)  # grey, floating point, NHW
    run(
        "problems/fastat.py",
        "--data",
        npz(x_train=x, x_test=x[:12]),
        "--epochs",
        1,
        "--attacks",
        "clean",
        "--out",
        "grey",
    )


def test_fewer_test_examples():
    run("problems/fastat.py", *SHORT[:-2], "--test-examples", 50, "--out", "out")
    assert json.loads(Path("out/results.json").read_text())["last"]["clean"]["n"] == 50


def test_named_data_is_found_as_an_npz():
    Path("mine").mkdir()
    npz("mine/cifar10.npz")
    run("problems/fastat.py", "--data", "cifar10", "--data-dir", "mine", *SHORT[:2], *SHORT[4:], "--out", "out")


def test_loading_refuses_what_is_not_a_checkpoint():
    run("problems/fastat.py", *SHORT, "--out", "out")

    class Evil:
        def __reduce__(self):
            return (Path("evil").touch, ())

    unchecked("out")
    torch.save({"model": Evil()}, "out/best.pt")
    with pytest.raises(ba.InputError, match="not a checkpoint of tensors"):
        ba.load("out")
    assert not Path("evil").exists()
    with pytest.raises(ba.InputError, match="which is 'first'"):
        ba.load("out", "first")
    with pytest.raises(ba.InputError, match="there is no run nowhere"):
        ba.load("nowhere")
    Path("net.pt").touch()
    with pytest.raises(ba.InputError, match=r"net.pt is a file, and no run: .* model.load_state_dict"):
        ba.load("net.pt")


def test_batches_of_one():
    from bilevel_at.data import Images, Loader

    images = Images(torch.zeros(7, 1, 2, 2), torch.zeros(7).long(), 2)
    for size, lengths in ((1, [1] * 7), (3, [3, 4]), (2, [2, 2, 3]), (4, [4, 3]), (9, [7])):
        loader = Loader(images, size)
        batches = [len(batch) for batch in loader.epoch(0)]
        assert batches == lengths and len(loader) == len(lengths), size
