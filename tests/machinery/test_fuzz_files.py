"""Image folders and torchvision's files from a stranger: read, or refused by a line that names them; no code is run.

As tests/machinery/test_fuzz.py: ``BILEVEL_FUZZ=50000`` draws more cases.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import struct
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from attempting import CASES, attempt, conclude
from data_files import write_cifar, write_fashion, write_svhn, write_tiny
from fuzzing import damaged_bytes, damaged_text
from fuzzing_images import EPS, add, image_bytes, other_kind, png, saved

import bilevel_at as ba
from bilevel_at.data import Loader, load_data

pytestmark = pytest.mark.usefixtures("without_network", "bounded")


class Runs:
    """What is unpickled makes the file ``ran``."""

    def __reduce__(self):
        return Path("ran").touch, ()


def copy_of(source, target):
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def damage(path, r):
    """Damage a file that is no image; how."""
    content, how = path.read_bytes(), r.choice(["bytes", "bytes", "bytes", "code", "header", "kind", "text"])
    if how == "kind":
        return other_kind(path, r)
    if how == "header":  # of an idx file
        sides = r.choice([(0x803, 2**32 - 1, 28, 28), (0x803, 30, 2**16, 2**16), (0x8FF, 1, 1), (0x803, 0, 28, 28)])
        path.write_bytes(struct.pack(f">{len(sides)}I", *sides) + content[16:])
    else:
        makers = {"bytes": damaged_bytes, "text": damaged_text, "code": lambda *_: pickle.dumps(Runs())}
        path.write_bytes(makers[how](content, r))
    return how


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100", "svhn", "tiny_imagenet"])
def test_torchvision_s_files_are_read_or_refused(name, monkeypatch):
    write = {
        "fashion_mnist": write_fashion,
        "tiny_imagenet": write_tiny,
        "svhn": partial(write_svhn, monkeypatch=monkeypatch),
    }
    write.get(name, partial(write_cifar, name=name, monkeypatch=monkeypatch))("whole")
    assert load_data(name, "whole", download=False, workers=0)[0].classes == 10
    files = sorted(p.relative_to("whole") for p in Path("whole").rglob("*") if p.is_file())
    files += [path for path in files if path.suffix == ".txt"]  # one of fifty or so
    failures, tally = [], Counter()
    for seed in range(CASES // (20 if name == "tiny_imagenet" else 4)):
        r = random.Random(seed)
        copy_of("whole", "data")
        path = "data" / r.choice(files)
        if path.suffix == ".JPEG" and r.random() < 0.7:
            path.write_bytes(image_bytes(r))
            how = "image"
        else:
            how = damage(path, r)
        action = partial(load_data, name, "data", download=False, workers=0)
        failures += filter(None, [attempt(seed, f"{path}, {how}", action, tally, "data")])
    assert not Path("ran").exists()
    conclude(failures, tally)


def test_an_annotation_leads_to_no_other_file(tmp_path):
    write_tiny("data")
    annotations = Path("data/tiny-imagenet-200/val/val_annotations.txt")
    os.mkfifo("pipe")
    failures, tally = [], Counter()
    for i, file in enumerate(
        ["../../../pipe", f"{tmp_path}/pipe", "/dev/zero", "../val_annotations.txt", "", ".", "\0", "x" * 300]
    ):
        annotations.write_text(f"{file}\tn100\n")
        action = partial(load_data, "tiny_imagenet", "data", download=False, workers=0)
        failures += filter(None, [attempt(i, repr(file), action, tally, "val_annotations.txt")])
    conclude(failures, tally)
    assert tally["read"] == 0


def seen(folder):
    """All that is done with a folder of images: listed, named, decoded for evaluation and for training."""
    for images in load_data("imagenet", folder, workers=0):
        images.sha256()
        images.pixels()
    for _ in Loader(load_data("imagenet", folder, workers=0)[0], 2).epoch(0):
        pass


@pytest.fixture
def folders():
    for split in ("train", "val"):
        for name in ("n01", "n02"):
            folder = Path("whole", split, name)
            folder.mkdir(parents=True)
            (folder / "0.JPEG").write_bytes(saved("RGB", "JPEG"))
    seen("whole")


def test_folders_of_images_are_read_or_refused(folders):
    failures, tally = [], Counter()
    for seed in range(CASES // 3):
        r = random.Random(seed)
        copy_of("whole", "data")
        folder = Path("data", r.choice(["train", "val"]), r.choice(["n01", "n02"]))
        how = r.choice(["image"] * 4 + ["kind", "kind", "add", "add", "class"])
        if how == "image":
            (folder / "0.JPEG").write_bytes(image_bytes(r))
        elif how == "kind":
            how = other_kind(folder / "0.JPEG", r)
        elif how == "class":
            shutil.rmtree(folder)
            how = other_kind(folder, r)
        else:
            how = add(folder, r)
        failures += filter(None, [attempt(seed, f"{folder}, {how}", partial(seen, "data"), tally, "data")])
    shutil.rmtree("data")
    conclude(failures, tally)
    assert tally["read"] > 10 and tally["refused"] > 40


def test_the_largest_image_stays_within_the_memory(folders):
    """One as large as is decoded, and one that is larger by a row; four of them, and as many threads."""
    failures, tally = [], Counter()
    for i, height in enumerate((9_459, 9_460)):
        content = png(9_459, height, bytes(9_460 * height))
        for name in "0123":
            Path(f"whole/train/n01/{name}.JPEG").write_bytes(content)
        train, _ = load_data("imagenet", "whole", workers=8)
        failures += filter(None, [attempt(i, f"9459×{height}", train.pixels, tally, "0.JPEG")])
    conclude(failures, tally)
    assert tally == {"read": 1, "refused": 1}


def test_formats_that_take_more_memory_have_a_lower_bound(folders):
    """Small files that say they are large: Pillow would make two canvases of one, and keep all of another."""
    from PIL import Image

    one, webp, jpeg = Image.new("RGB", (16, 16)), io.BytesIO(), io.BytesIO()
    one.save(webp, "WEBP", save_all=True, append_images=[Image.new("RGB", (16, 16), "red")])
    one.save(jpeg, "JPEG", progressive=True)
    canvas, frame = bytearray(webp.getvalue()), bytearray(jpeg.getvalue())
    assert canvas[12:16] == b"VP8X"
    canvas[24:30] = 2 * (8_999).to_bytes(3, "little")
    start = frame.index(b"\xff\xc2") + 5  # of a progressive frame's height and width
    frame[start : start + 4] = 2 * (9_000).to_bytes(2, "big")
    for content in (canvas, frame):
        Path("whole/train/n01/0.JPEG").write_bytes(content)
        with pytest.raises(ba.InputError, match="it is 9000×9000; at most 40,000,000 pixels"):
            seen("whole")


def test_postscript_is_not_run(folders, monkeypatch):
    """Pillow has Ghostscript run what begins as EPS does, whatever the file is called."""
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("a program is run"))
    Path("whole/train/n01/0.JPEG").write_bytes(EPS)
    with pytest.raises(ba.InputError, match="n01/0.JPEG cannot be read as an image: cannot identify image file"):
        seen("whole")
