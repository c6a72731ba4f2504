"""ImageNet, which is streamed: views, subsets, fingerprints, batches, and files that are no images."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import (
    everything,
    write_imagenet,
)
from marks import fast
from PIL import Image
from torchvision import datasets, transforms

import bilevel_at as ba
from bilevel_at.data import Images, Loader, Streamed, load_data, stream
from bilevel_at.data.sets import check_images

pytestmark = pytest.mark.usefixtures("without_network")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A small ImageNet, written once."""
    root = tmp_path_factory.mktemp("photographs")
    write_imagenet(root / "imagenet")
    return root


@pytest.fixture
def streamed(photographs):
    return load_data("imagenet", photographs, workers=0)[0]


def both(streamed):
    return [Images(torch.arange(23)[:, None, None, None].float() / 23, torch.arange(23) % 3, 3), streamed]


def test_imagenet_is_streamed(photographs):
    train, val = load_data("imagenet", photographs)
    inside, _ = load_data("imagenet", photographs / "imagenet")
    assert isinstance(train, Streamed) and 1 <= train.workers <= 8
    assert (len(train), len(val), train.classes, val.classes, train.shape) == (12, 6, 3, 3, (3, 224, 224))
    assert train.y.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and train.y.dtype == torch.int64
    assert train.names.tolist()[5] == b"train/n02/n02_1.JPEG" and inside.sha256() == train.sha256()
    assert train.device == train.y.device == torch.device("cpu")


def test_the_evaluation_view_is_torchvision_s(photographs):
    expected = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()])
    for part, split in zip(load_data("imagenet", photographs), ("train", "val"), strict=True):
        reference = datasets.ImageFolder(photographs / "imagenet" / split, expected)
        assert {Image.open(path).mode for path, _ in reference.samples} == {"RGB", "L"}
        x = part.pixels()
        assert x.dtype == torch.float32 and torch.equal(x, torch.stack([image for image, _ in reference]))
        assert part.y.tolist() == [label for _, label in reference]
        rows = torch.tensor([4, 0])
        assert torch.equal(part[rows].pixels(), x[rows]) and torch.equal(part[1:3].pixels(), x[1:3])
        assert torch.equal(part[part.y == 1].pixels(), x[part.y == 1])
        assert part[torch.tensor([], dtype=torch.int64)].pixels().shape == (0, 3, 224, 224)


def test_sets_are_subset_alike(streamed):
    for images in both(streamed):
        rest, held = images.split(0.1, seed=3)
        assert len(held) == max(1, round(len(images) / 10)) and len(rest) + len(held) == len(images)
        parts = [*rest.pixels(), *held.pixels()]
        assert all(sum(torch.equal(x, part) for part in parts) == 1 for x in images.pixels())
        again, other = images.split(0.1, seed=3)[0], images.split(0.1, seed=4)[0]
        assert again.sha256() == rest.sha256() != other.sha256()
        few = images.sample(5, seed=1)
        assert len(few) == 5 and few.sha256() == images.sample(5, seed=1).sha256() != images.sample(5).sha256()
        assert len(images.sample(1000)) == len(images)
        assert len({x.numpy().tobytes() for x in few.pixels()}) == 5
        assert (few.classes, few.shape, few.device) == (images.classes, images.shape, images.y.device)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[:5]
        assert torch.equal(few.y, images.y[order])
        assert few.to("cpu").sha256() == few.sha256()


def test_the_fingerprint_of_streamed_images(photographs, streamed):
    before, path = streamed.sha256(), photographs / "imagenet/train/n01/n01_0.JPEG"
    flipped = Streamed(streamed.root, streamed.names, streamed.y.flip(0), 3, 0)
    assert before == streamed.sha256() and len({before, flipped.sha256(), streamed[1:].sha256()}) == 3
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    assert streamed.sha256() != before
    path.write_bytes(content)
    assert streamed.sha256() == before


def test_mistakes_in_imagenet(monkeypatch):
    with pytest.raises(
        ba.InputError, match="it cannot be downloaded; put .* or imagenet/ with folders train/ and val/"
    ):
        load_data("imagenet")
    assert everything() == []
    write_imagenet("data", per_class=1)
    with pytest.raises(ba.InputError, match="workers is -1; it must be at least 0"):
        load_data("imagenet", workers=-1)
    Path("data/val/n03").rename("data/val/n04")
    with pytest.raises(ba.InputError, match="train and val must have the same classes, and n03 is in one of them only"):
        load_data("imagenet")
    shutil.rmtree("data/val")
    Path("data/val").mkdir()
    Path("data/val/flat.JPEG").touch()
    with pytest.raises(ba.InputError, match="data/val must have a folder of images for each class"):
        load_data("imagenet")


def test_imagenet_s_archives_are_unpacked_once(monkeypatch):
    from torchvision.datasets import imagenet as theirs

    write_imagenet("source", per_class=1)
    home = Path("data/imagenet")
    home.mkdir(parents=True)
    for part, (file, _) in theirs.ARCHIVE_META.items():
        (home / file).write_text(part)
    before = everything()
    with pytest.raises(ba.InputError, match="ImageNet's archives in data/imagenet cannot be unpacked"):
        load_data("imagenet")  # torchvision finds the checksums wrong
    assert everything() == before

    def unpack(root, split):  # as torchvision's class would, from archives it can read
        assert {(Path(root) / file).read_text() for file, _ in theirs.ARCHIVE_META.values()} == {*theirs.ARCHIVE_META}
        shutil.copytree(f"source/{split}", f"{root}/{split}")

    monkeypatch.setattr(datasets, "ImageNet", unpack)
    train, val = load_data("imagenet")
    assert (len(train), len(val)) == (3, 6)
    assert set(before) < set(everything()) and not any(p.is_symlink() for p in home.iterdir())
    monkeypatch.setattr(datasets, "ImageNet", None)
    assert load_data("imagenet")[0].sha256() == train.sha256()


@pytest.mark.parametrize("workers", fast([0, 2], [0]))
@pytest.mark.parametrize("content", [b"", b"hello", "half"])
def test_a_file_that_is_no_image_is_named(content, workers, photographs, tmp_path):
    shutil.copytree(photographs / "imagenet", "data")
    path = Path("data/train/n02/n02_2.JPEG")
    path.write_bytes(path.read_bytes()[:3000] if content == "half" else content)
    train, _ = load_data("imagenet", "data", workers=workers)
    for use in (train.pixels, lambda: list(Loader(train, 5).epoch(0))):
        with pytest.raises(ba.InputError, match=r"data/train/n02/n02_2.JPEG cannot be read as an image: \w") as error:
            use()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("end", ["a file that is no image", "batches that are left", "a worker that is killed"])
def test_no_process_waits_for_its_workers(end, photographs, tmp_path):
    """They heed the second SIGTERM only, and Python sends one as a process ends."""
    shutil.copytree(photographs / "imagenet", tmp_path / "data")
    if end == "a file that is no image":
        (tmp_path / "data/train/n01/n01_0.JPEG").write_text("no image")
    program = """
        import multiprocessing, os, signal
        from bilevel_at.data import Loader, load_data
        batches = iter(Loader(load_data("imagenet", "data", workers=2)[0], 2).epoch(0))
        try:
            for _ in range(2 if "left" in "END" else 12):
                next(batches)
                if "killed" in "END":
                    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        except (ValueError, RuntimeError) as error:
            print(error)
            left = error  # and with it torch's frames
    """
    program = textwrap.dedent(program).replace("END", end)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    # Of a killed process torch's handler of SIGCHLD may speak first, wherever the program is.
    killed = "a process that decodes images was killed, perhaps for want of memory|is killed by signal: Killed"
    message = {"a file that is no image": "n01_0.JPEG cannot be read as an image", "batches that are left": ""}
    assert re.search(message.get(end, killed), done.stdout), done.stdout
    assert len(done.stdout.splitlines()) == (end != "batches that are left")


def epoch(images, number, workers=0, seed=0, augment="resized-crop-flip", batch_size=5):
    images = Streamed(images.root, images.names, images.y, images.classes, workers)
    return list(Loader(images, batch_size, seed, augment).epoch(number))


def same(a, b):
    return all(torch.equal(p.x, q.x) and torch.equal(p.index, q.index) for p, q in zip(a, b, strict=True))


def test_streamed_batches_depend_on_seed_and_epoch_alone(streamed):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = epoch(streamed, 3)
        assert same(batches, epoch(streamed, 3, workers=2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert same(batches, epoch(streamed, 3))
    assert not same(batches, epoch(streamed, 4)) and not same(batches, epoch(streamed, 3, seed=1))

    assert [len(batch) for batch in batches] == [5, 5, 2]
    index = torch.cat([batch.index for batch in batches])
    assert index.sort().values.tolist() == list(range(12)) and index.tolist() != list(range(12))
    for batch in batches:
        assert batch.x.shape[1:] == (3, 224, 224) and batch.x.dtype == torch.float32 and batch.view is None
        assert torch.equal(batch.y, streamed.y[batch.index])
        assert torch.equal((255 * batch.x).round() / 255, batch.x)
        check_images(batch.x, batch.y, 3)


def test_an_example_s_crop_is_not_its_neighbours(streamed):
    """The view of example i in an epoch is the same in whatever batch it comes, and differs between epochs."""
    crops = [{}, {}]
    for number in (0, 1):
        for size in (5, 12):
            for batch in epoch(streamed, number, batch_size=size):
                for i, x in zip(batch.index.tolist(), batch.x, strict=True):
                    assert torch.equal(crops[number].setdefault(i, x), x)
    assert all(not torch.equal(crops[0][i], crops[1][i]) for i in range(12))
    copies = Streamed(streamed.root, streamed.names[[1] * 12], streamed.y[[1] * 12], 3, 0)
    views = {x.numpy().tobytes() for batch in epoch(copies, 0) for x in batch.x}
    assert len(views) == 12


def test_the_training_view_is_torchvision_s(streamed):
    """A whole photograph of one colour stays so; one of its halves black shows flips in about half of the views."""
    path = Path("half.png")
    image = np.zeros((256, 256, 3), dtype=np.uint8)
    image[:, 128:] = 255
    Image.fromarray(image).save(path)
    one = Streamed(Path(), np.array([b"half.png"]), torch.zeros(1).long(), 1, 0)
    views = torch.cat([batch.x for e in range(60) for batch in epoch(one, e)])
    left, right = views[:, 0, :, :20].mean((1, 2)), views[:, 0, :, -20:].mean((1, 2))
    mixed = (left - right).abs() > 0.5
    assert mixed.sum() > 20 and 0.25 < (left > right)[mixed].float().mean() < 0.75
    widths = {round(x[0, 0].mean().item(), 2) for x in views}  # where the edge lies varies with the crop
    assert len(widths) > 20


def test_without_augmentation_batches_are_what_evaluation_sees(streamed):
    pixels = streamed.pixels()
    for batch in epoch(streamed, 0, workers=2, augment="none"):
        assert torch.equal(batch.x, pixels[batch.index])


def test_augmentations_are_for_the_set_they_are_for(streamed):
    memory = Images(torch.zeros(7, 1, 2, 2), torch.zeros(7).long(), 2)
    line = "augment 'resized-crop-flip' is not for images in memory; choose 'crop-flip' or 'none'"
    with pytest.raises(ba.InputError, match=line):
        Loader(memory, 2, augment="resized-crop-flip")
    line = "augment 'crop-flip' is not for images streamed from files; choose 'resized-crop-flip' or 'none'"
    with pytest.raises(ba.InputError, match=line):
        Loader(streamed, 2, augment="crop-flip")
    with pytest.raises(ba.InputError, match="augment 'mixup' is not known; choose from none, crop-flip"):
        Loader(memory, 2, augment="mixup")


def test_a_last_streamed_example_joins_the_batch_before(streamed):
    loader = Loader(streamed[:11], 5)
    assert [len(batch) for batch in loader.epoch(0)] == [5, 6] and len(loader) == 2


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_waits_until_a_batch_is_fetched(streamed, times, monkeypatch):
    """Within the fetch it could leave a queue's lock taken; a second one does not wait."""
    seen = []

    class Interrupted:
        def __init__(self, dataset, **options): ...

        def __iter__(self):
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            seen.append("fetched")
            yield torch.zeros(1)

    monkeypatch.setattr(stream, "DataLoader", Interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            next(streamed.files().batches([[0]], workers=1))
        assert seen == ["fetched"] * (times == 1) and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True])
def test_ctrl_c_while_workers_decode(photographs, group, interruptible):
    """SIGINT to the parent alone, or to all its processes as a terminal does: one KeyboardInterrupt, then silence."""
    source = f"""
        import sys, torch
        from bilevel_at.data import Loader, load_data
        train, _ = load_data("imagenet", {str(photographs)!r}, workers=2)
        train = train[torch.arange(12).repeat(1000)]
        try:
            for i, batch in enumerate(Loader(train, 4, augment="resized-crop-flip").epoch(0)):
                print(i, flush=True)
        except KeyboardInterrupt:
            print("stopped", flush=True)
            sys.exit(130)
    """
    command = [sys.executable, "-c", textwrap.dedent(source)]
    process = interruptible(command, start_new_session=True)
    assert process.stdout.readline() == "0\n"
    start = time.monotonic()
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    shown, said = process.communicate(timeout=60)
    assert process.returncode == 130 and shown.splitlines()[-1] == "stopped" and said == ""
    assert time.monotonic() - start < 20
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no worker is left
