"""The benchmark scripts run, at the smallest size, and record what they say they record."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from benchmarking import FOLDER, script
from PIL import Image

import bilevel_at as ba

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_cifar10")]


def test_epoch_times_every_method_beside_a_plain_epoch():
    flags = ["--data", "cifar10", "--model", "one_layer_cnn", "--examples", "24", "--batch-size", "12"]
    flags += ["--variants", "float32", "bfloat16", "--device", "cpu", "--write", "results"]
    assert script("epoch").command([*flags, "--methods", "fastat", "free", "atas"]) == 0
    (path,) = Path("results").glob("*.json")
    record = json.loads(path.read_text())
    assert [(r["variant"], r["memory_format"], r["method"]) for r in record["rows"]] == [
        (variant, memory_format, method)
        for variant in ("float32", "bfloat16")
        for memory_format in ("contiguous", "channels_last")
        for method in ("standard", "fastat", "free", "atas")
    ]
    assert all(r["seconds"] > 0 and r["ratio"] > 0 for r in record["rows"]) and record["rows"][0]["ratio"] == 1
    assert record["device"].endswith("CPU") and {r["examples"] for r in record["rows"]} == {24}
    assert set(script("epoch").METHODS) >= {"fastbat", "gradalign", "trades", "mart", "beta", "standard"}


def test_the_trainer_is_compared_with_a_bare_loop():
    script("trainer").command(["--repeats", "1", "--examples", "40", "--epochs", "1", "--write", "results/trainer.md"])
    rows = re.findall(r"^\| (\w+), (\w+) \| ([\d.]+) \|$", Path("results/trainer.md").read_text(), re.M)
    assert [(network, method) for network, method, _ in rows] == [
        (network, method) for network in ("small_cnn", "small_resnet") for method in ("fastat", "fastbat")
    ]
    assert all(float(ratio) > 0 for *_, ratio in rows)


def test_full_kkt_compares_its_two_forms():
    script("full_kkt").command(["--examples", "4", "--repeats", "1", "--write", "results/full-kkt.md"])
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| (\S+) \|$", Path("results/full-kkt.md").read_text(), re.M)
    assert [int(d) for d, *_ in rows] == list(script("full_kkt").SIZES)
    assert all(float(ratio) > 0 and float(gap) < 1e-4 for _, ratio, gap in rows)
    with pytest.raises(ba.InputError, match="--repeats is 0; it must be at least 1"):
        script("full_kkt").command(["--repeats", "0"])


def test_polyhedra_are_projected_both_ways():
    flags = ["--repeats", "1", "--device", "cpu", "--sizes", "1", "8", "--write", "results/polyhedra.md"]
    script("polyhedra").command(flags)
    rows = [line.strip("| ").split(" | ") for line in Path("results/polyhedra.md").read_text().splitlines()]
    rows = [row for row in rows if row[0].isdigit()]
    assert [row[:4] for row in rows] == [["128", "64", "20", "none"], ["256", "12", "6", "[0, 1]"]]
    for *_, single, together, ratio, left, distance in rows:
        assert min(float(single), float(together), float(ratio)) > 0 and int(left) <= 2 and float(distance) < 1e-11
    for mistake, message in ((["--repeats", "0"], "--repeats is 0"), (["--sizes", "99"], "--sizes 99 is not a row")):
        with pytest.raises(ba.InputError, match=message):
            script("polyhedra").command(mistake)


def test_cifar10_trains_evaluates_and_records(capsys):
    flags = [
        "--epochs",
        "1",
        "--model",
        "one_layer_cnn",
        "--test-examples",
        "6",
        "--autoattack",
        "2",
        "--device",
        "cpu",
    ]
    args = ["--methods", "fastat", "pgd-2", "--epsilons", "8/255", *flags, "--folder", "runs"]
    script("cifar10").command(args)
    first = {p.name: json.loads(p.read_text()) for p in Path("runs").glob("*.json")}
    assert len(first) == 2
    for record in first.values():
        assert {"clean", "pgd-50-10", "autoattack"} == set(record["results"]["last"])
        assert record["results"]["last"]["autoattack"]["n"] == 2
        assert record["results"]["last"]["autoattack"]["accuracy"] <= 1
        assert record["recipe"]["augment"] == "crop-flip" and record["recipe"]["model"] == "one_layer_cnn"
        assert record["recipe"]["problem"]["epsilon"] == pytest.approx(8 / 255)
        assert record["training_seconds_per_epoch"] > 0 and record["versions"]["torch"]
    (pgd,) = (r for r in first.values() if r["method"] == "pgd-2")
    assert pgd["recipe"]["problem"] == {
        "epsilon": 8 / 255,
        "steps": 2,
        "step": 4 / 255,
        "mode": "train",
        "draw": "cube",
        "label_smoothing": 0.0,
    }
    table = Path("runs/cifar10.md").read_text()
    assert "| fastat | 8/255 | 0 |" in table and "[45.49 ± 0.21]" in table and "(n = 2)" in table

    script("cifar10").command(args)  # everything is there: nothing is trained or attacked again
    again = {p.name: json.loads(p.read_text()) for p in Path("runs").glob("*.json")}
    assert again == first
    with pytest.raises(ba.InputError, match="--methods fast is not known; choose from fastbat"):
        script("cifar10").command(["--methods", "fast"])


def test_digits_makes_a_table_and_a_figure():
    script("digits").command(["--seeds", "1", "--methods", "standard", "fgsm", "--write", "docs/digits.md"])
    page = Path("docs/digits.md").read_text()
    assert "| standard | " in page and "| fgsm | " in page and "(digits.png)" in page
    assert Path("docs/digits.png").read_bytes()[:4] == b"\x89PNG"
    numbers = json.loads(Path("docs/digits.json").read_text())["rows"]
    assert list(numbers) == ["standard", "fgsm"] and f"| {numbers['fgsm']['last clean']['mean']:.1f} | " in page
    Path("docs/digits.json").unlink()
    assert script("digits").command(["--tabulate", "docs/digits.md"]) == 0
    assert json.loads(Path("docs/digits.json").read_text())["rows"] == numbers
    with pytest.raises(ba.InputError, match="--methods fast is not known"):
        script("digits").command(["--methods", "fast"])


def test_readme_s_commands_are_timed(monkeypatch):
    commands = script("commands")
    called = [line.split()[2] for line in commands.printed()]
    assert called == ["bilevel_at.run", "bilevel_at.evaluate", "bilevel_at.report"]
    monkeypatch.setattr(commands, "printed", lambda: ["python -m bilevel_at.run --list"])
    assert commands.command(["--write", "page.md"]) == 0
    assert re.search(r"^\| `python -m bilevel_at.run --list` \| \d+ \| \d+ \|$", Path("page.md").read_text(), re.M)
    monkeypatch.setattr(commands, "printed", lambda: ["python -m bilevel_at.run nothing"])
    with pytest.raises(ba.BilevelError, match="problem file nothing does not exist"):
        commands.benchmark()


def test_attacks_are_compared(monkeypatch):
    attacks = script("attacks")
    run, load = attacks.main_job.run, attacks.load_data
    monkeypatch.setattr(attacks, "METHODS", ("fastat",))
    monkeypatch.setattr(attacks.main_job, "run", lambda args: run([*args, "--epochs", "3"]))
    monkeypatch.setattr(attacks, "load_data", lambda name: (None, load(name)[1][slice(0, 8)]))
    attacks.command(["--seeds", "1", "--write", "attacks.md"])
    page = Path("attacks.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+) \| [^|]+ \| ([\d.]+) \|$", page, re.M))
    assert len(rows) == 7 and all(0 <= float(value) <= 100 for value in rows.values())
    assert float(rows["AutoAttack"]) <= float(rows["PGD-50-10"]) + 12.5  # one image of eight
    with pytest.raises(ba.InputError, match="--seeds is 0"):
        attacks.command(["--seeds", "0"])


def test_gradient_norms_make_a_page_and_two_figures():
    flags = ["--seeds", "1", "--epochs", "1", "--examples", "60", "--steps", "1.25", "--jobs", "1"]
    command = [sys.executable, str(FOLDER / "gradient_norms.py"), *flags, "--write", "docs/norms.md"]
    subprocess.run(command, check=True, capture_output=True)
    page = Path("docs/norms.md").read_text()
    assert "| lowest 20 % | " in page and "| random 40 % | " in page and "(norms.png)" in page
    assert Path("docs/norms.png").read_bytes()[:4] == Path("docs/norms-epochs.png").read_bytes()[:4] == b"\x89PNG"


def test_compiled_steps_are_compared():
    flags = ["--models", "small_cnn", "--methods", "fastat", "--batch-size", "4", "--repeats", "1"]
    script("compiled").command([*flags, "--write", "results/compiled.md"])
    row = re.search(
        r"^\| small_cnn, fastat \| ([\d.]+) \| (\S+) \| \d+ \|$", Path("results/compiled.md").read_text(), re.M
    )
    assert row is not None and float(row[1]) > 0 and float(row[2]) < 0.1


def test_attacks_are_timed_beside_those_of_others():
    module = script("attack_time")
    peers = [peer for peer in module.PEERS if find_spec(peer)]  # foolbox is of the test extra
    if not peers:
        pytest.skip("neither foolbox nor torchattacks, the peers, is installed: pip install foolbox")
    absent = set(module.PEERS) - set(peers)
    words = ["--examples", "20", "--repeats", "1", "--peers", *peers, "--networks", "fastat"]
    case = module.Case("digits, fastat", ("problems/fastat.py", "--epochs", "1", "--examples", "200"), "digits", 0.2)
    module.cases = lambda data_dir: [case]
    module.STRONG = ("beta-3", "nearest-3-2")  # AutoAttack takes a minute
    module.command([*words, "--write", "results/attack-time.md"])
    page = Path("results/attack-time.md").read_text()
    rows = re.findall(r"^\| ([\w ,]+) \| ([\d.]+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|", page, re.M)
    assert [row[0] for row in rows] == [side for side in module.SIDES if side not in absent]
    assert float(rows[0][1]) == 1 and int(rows[0][2]) <= int(rows[1][2]) <= 50
    assert [name for name in module.STRONG if f"| {name} | " in page] == list(module.STRONG)
    # All of them attack the images that are classified correctly, and no others.
    torch.manual_seed(0)
    x, y = torch.rand(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64)
    network = module.Counted(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))).eval()
    right = int((network(x).argmax(1) == network(x[:1]).argmax(1)).sum())
    y[:] = network(x[:1]).argmax(1)
    for side in set(module.SIDES) - absent - {"this library"}:
        network.gradients = 0
        module.SIDES[side](network, x, y, 1e-6, 1)
        assert network.gradients == 50 * right and 0 < right < 20, side
    with pytest.raises(ba.InputError, match="--peers cleverhans is not known"):
        module.command(["--peers", "cleverhans"])


def test_scaling_measures_every_axis_and_keeps_the_others(monkeypatch, drawn):
    scaling = script("scaling")
    small = {"restarts": {"epochs": 1}, "workers": {"images": 4}}
    for name, (measure, points) in scaling.AXES.items():
        monkeypatch.setitem(scaling.AXES, name, scaling.Choice(partial(measure, **small.get(name, {})), points[:2]))
    threads = torch.get_num_threads()
    try:
        scaling.command(["--repeats", "1", "--write", "results"])
        first = {path.name: path.read_bytes() for path in Path("results").iterdir()}
        scaling.command(["--repeats", "2", "--points", "1", "--only", "batch", "--write", "results"])
    finally:
        torch.set_num_threads(threads)
    files = {f"scaling-{name}.{kind}" for name in scaling.AXES for kind in ("json", "png")}
    assert set(first) == files | {"scaling.md"}
    for name in scaling.AXES:
        with Image.open(f"results/scaling-{name}.png") as figure:
            figure.load()
            assert figure.format == "PNG" and min(figure.size) > 400 and figure.convert("L").getextrema() == (0, 255)
    again = {name for name, content in first.items() if (Path("results") / name).read_bytes() != content}
    assert again == {"scaling-batch.json", "scaling-batch.png", "scaling.md"}

    sections = re.split(r"^## ", first["scaling.md"].decode(), flags=re.M)[1:]
    assert len(sections) == len(scaling.AXES) == 9
    for section, (name, choice) in zip(sections, scaling.AXES.items(), strict=True):
        rows = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in re.findall(r"^\| .*\|$", section, re.M)]
        assert [row[0] for row in rows[1:3]] == [f"{point:,}" for point in choice.points]
        assert len({len(row) for row in rows}) == 1
        assert all(float(cell.split(" ")[0].replace(",", "")) > 0 for row in rows[1:3] for cell in row[1:])
        assert f"scaling-{name}.png" in section and f"--only {name} --repeats 1 --write" in section
        assert ("exponent" in section) == (name != "workers")
    # Operations are counted, not timed: those of a step of Fast-AT, 5 passes, are 5/3 of standard training's 3.
    assert re.search(r"^\| 8 \| 1 \(1\) \| \S+ \(1\.67\) \|", sections[0], re.M)
    page = Path("results/scaling.md").read_text()
    assert page.count("--repeats 1 --write") == 8 and "--only batch --repeats 2 --points 1 --write" in page
    for flags, message in (
        (["--only", "depth"], "--only depth is not an axis; choose from batch, size"),
        (["--points", "0"], "--points is 0; it must be at least 1"),
    ):
        with pytest.raises(ba.InputError, match=message):
            scaling.command(flags)


def test_the_exponent_of_a_power_is_found():
    axis = script("scaling_measure")
    line = axis.Line("cubic", [[c * n**3 for c in (1.0, 2.0, 3.0)] for n in (2, 4, 8)])
    made = axis.Axis("a", "A", "n", "", [2, 4, 8], [line])
    assert made.exponent(line, 0, 2) == pytest.approx(3) and made.exponent(line, 1, 2) == pytest.approx(3)
    assert axis.Axis.from_dict(json.loads(json.dumps(made.asdict()))) == made


def test_steps_are_counted_here_and_as_authors_make_them():
    script("passes").command(["--repeats", "1", "--batch-size", "2", "--write", "results/passes.md"])
    page = Path("results/passes.md").read_text()
    rows = {name: (float(a), b) for name, a, b in re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.–]+) \|", page, re.M)}
    assert rows["Fast-BAT"] == (3.71, "4.37") and rows["TRADES"] == (9.01, "13.01")
    assert all(ours <= float(theirs) for ours, theirs in rows.values() if theirs != "–")


def test_other_ways_of_a_pass_are_timed():
    script("attack_pass").command(["--repeats", "1", "--write", "results/attack-pass.md"])
    rows = re.findall(r"^\| (\D[^|]+) \| ([\d.]+) \| ([\d.]+) \|$", Path("results/attack-pass.md").read_text(), re.M)
    assert rows[0] == ("in use", "1.00", "1.00") and len(rows) == 6
    assert all(float(a) > 0 and float(b) > 0 for _, a, b in rows)


def test_the_main_job_is_compared_with_another_checkout(monkeypatch):
    module, asked = script("main_job"), []

    def job(checkout, method, seed, out):
        asked.append((checkout.name, method, seed))
        return (2.0, {"last": {"clean": 0.5}}) if "before" in checkout.name else (1.0, {"last": {"clean": 0.5 + seed}})

    monkeypatch.setattr(module, "main_job", job)
    Path("before/bilevel_at").mkdir(parents=True)
    module.command(["--before", "before", "--methods", "fastat", "--seeds", "2", "--write", "results/main-job.md"])
    page = Path("results/main-job.md").read_text()
    assert "| fastat | 0 | 0.50 | equal |" in page and "| fastat | 1 | 0.50 | {'last': {'clean': 0.5}} before" in page
    assert [name for name, *_ in asked] == ["before", module.HERE.name] * 2
    with pytest.raises(ba.InputError, match="elsewhere is no checkout of this project"):
        module.command(["--before", "elsewhere"])


def test_a_run_of_the_main_job_is_timed(tmp_path, monkeypatch):
    module = script("main_job")
    few = ["--epochs", "1", "--examples", "60", "--test-examples", "10", "--attacks", "clean"]
    popen = subprocess.Popen
    monkeypatch.setattr(module.subprocess, "Popen", lambda command, **more: popen([*command, *few], **more))
    seconds, accuracies = module.main_job(module.HERE, "fastat", 0, tmp_path / "run")
    assert seconds > 0.5 and accuracies.keys() == {"best", "last"}
    with pytest.raises(ba.BilevelError, match="seed -1"):
        module.main_job(module.HERE, "fastat", -1, tmp_path / "other")


def test_several_gpus_on_paper():
    """The expected largest part, against draws; and what the page adds up."""
    processes = script("processes")
    for batch, count in ((64, 8), (256, 64), (3, 4)):
        draws = torch.randint(0, count, (20_000, batch), generator=torch.Generator().manual_seed(0))
        parts = torch.zeros(20_000, count).scatter_add_(1, draws, torch.ones(draws.shape)).amax(1)
        expected = processes.expected_largest(batch, count)
        assert abs(expected - parts.mean().item()) < 5 * parts.std().item() / len(parts) ** 0.5
    assert processes.expected_largest(1, 3) == pytest.approx(1) and processes.expected_largest(5, 1) == pytest.approx(5)
    processes.command(["--gpus", "2", "--per-gpu", "16", "--write", "results/processes.md"])
    page = Path("results/processes.md").read_text()
    kept = 1_281_167 * (3 * 32 * 32 * 4 + 1 + 4 + 1) / 1e9  # a perturbation and v, and whether each is known
    assert f"| ATAS, kept at 32×32 | {kept:,.2f} | {kept / 2:,.2f} |" in page
    # 53 layers: a sum forward and one backward, in the attack and in the update.
    assert f"| Fast-AT | {53 * 4} |" in page and "Gradients: 102,228,128 bytes" in page
    with pytest.raises(ba.InputError, match="--gpus is 0; it must be at least 1"):
        processes.command(["--gpus", "0"])


def test_sharded_parameters_train_as_whole_ones(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    script("sharded").command(["--steps", "2", "--write", "results/sharded.md"])
    page = Path("results/sharded.md").read_text()
    assert "| `loss.backward()` | right, reduced and sharded" in page
    rows = re.findall(r"^\| ([^|`]+) \| (\de-\d+|0e\+00) \| ([\d,]+) \| ([\d,]+) \|$", page, re.M)
    assert len(rows) == 3 and all(float(gap) < 1e-12 for _, gap, *_ in rows), page
    assert all(int(here.replace(",", "")) * 2 == int(whole.replace(",", "")) for *_, here, whole in rows)
