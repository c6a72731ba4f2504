"""Data sets in the formats of their own files, made up and small."""

from __future__ import annotations

import gzip
import hashlib
import pickle
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets

from bilevel_at.data import downloads

RNG = np.random.default_rng


FETCH = downloads.fetch


def everything(folder="."):
    return sorted(str(p) for p in Path(folder).rglob("*"))


def md5(path):
    return hashlib.md5(Path(path).read_bytes()).hexdigest()


def pictures(n, seed=0, size=32):
    """uint8 NHWC images and labels 0 … 9, each of them there."""
    return RNG(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8), np.arange(n) % 10


def agrees(images, x_nhwc, y):
    assert images.x.dtype == torch.uint8 and images.x.is_contiguous() and images.y.dtype == torch.int64
    assert images.x.permute(0, 2, 3, 1).equal(torch.from_numpy(x_nhwc)) and images.y.tolist() == list(y)


def write_cifar(root, name, monkeypatch=None):
    """CIFAR as torchvision unpacks it; with ``monkeypatch``, torchvision takes the checksums from these files."""
    of = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    labels = "labels" if name == "cifar10" else "fine_labels"
    folder = Path(root, of.base_folder)
    folder.mkdir(parents=True)
    written = {}
    for part, files in (("train", of.train_list), ("test", of.test_list)):
        xs, ys = [], []
        for i, (file, _) in enumerate(files):
            x, y = pictures(30, seed=len(part) + i)
            entry = {"data": x.transpose(0, 3, 1, 2).reshape(30, -1), labels: y.tolist()}
            (folder / file).write_bytes(pickle.dumps(entry))
            xs.append(x)
            ys.append(y)
        written[part] = np.concatenate(xs), np.concatenate(ys)
        if monkeypatch is not None:
            sums = [[file, md5(folder / file)] for file, _ in files]
            monkeypatch.setattr(of, f"{part}_list", sums)
    (folder / of.meta["filename"]).write_bytes(pickle.dumps({of.meta["key"]: [str(i) for i in range(10)]}))
    if monkeypatch is not None:
        monkeypatch.setattr(of, "meta", {**of.meta, "md5": md5(folder / of.meta["filename"])})
    return written


def write_svhn(root, monkeypatch):
    from scipy.io import savemat

    Path(root).mkdir(parents=True, exist_ok=True)
    written, sums = {}, dict(datasets.SVHN.split_list)
    for part in ("train", "test"):
        x, y = pictures(40, seed=len(part))
        url, file, _ = sums[part]
        savemat(Path(root, file), {"X": x.transpose(1, 2, 3, 0), "y": np.where(y == 0, 10, y)[:, None]})
        sums[part] = [url, file, md5(Path(root, file))]
        written[part] = x, y
    monkeypatch.setattr(datasets.SVHN, "split_list", sums)
    return written


def write_fashion(root, zipped=False):
    folder = Path(root, "FashionMNIST", "raw")
    folder.mkdir(parents=True)
    written = {}
    for part, file in (("train", "train"), ("test", "t10k")):
        x, y = pictures(30, seed=len(part), size=28)
        x = x[..., :1]
        for kind, values in (("images-idx3", x[..., 0]), ("labels-idx1", y.astype(np.uint8))):
            header = b"".join(n.to_bytes(4, "big") for n in (0x800 + values.ndim, *values.shape))
            data = header + values.tobytes()
            path = folder / f"{file}-{kind}-ubyte"
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(data)) if zipped else path.write_bytes(data)
        written[part] = x, y
    return written


WNIDS = [f"n{100 + i}" for i in range(10)]


def write_tiny(root):
    """Tiny-ImageNet: 3 images in each of 10 classes, one of them grey; 10 to test. Returns what Pillow decodes."""
    folder = Path(root, "tiny-imagenet-200")
    written = {"train": ([], []), "test": ([], [])}

    def save(path, seed, part, label):
        image = Image.fromarray(RNG(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))
        image = image.convert("L") if seed == 4 else image
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        written[part][0].append(np.asarray(Image.open(path).convert("RGB")))
        written[part][1].append(label)

    for label, wnid in enumerate(WNIDS):
        for i in range(3):
            save(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 3 * label + i, "train", label)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("not an image")
    for i, label in enumerate(reversed(range(10))):
        save(folder / "val" / "images" / f"val_{i}.JPEG", 100 + i, "test", label)
    lines = [f"val_{i}.JPEG\t{WNIDS[label]}\t0\t0\t9\t9\n" for i, label in enumerate(reversed(range(10)))]
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return {part: (np.stack(x), y) for part, (x, y) in written.items()}


def write_imagenet(root, per_class=4):
    """3 classes of small JPEGs of all shapes, every fifth of them grey."""
    for part, n in (("train", per_class), ("val", 2)):
        for c, wnid in enumerate(("n01", "n02", "n03")):
            folder = Path(root, part, wnid)
            folder.mkdir(parents=True)
            for i in range(n):
                size = (230 + 37 * i, 300 - 20 * i, 3) if part == "train" else (100, 260 + i, 3)
                image = Image.fromarray(RNG(31 * c + i).integers(0, 256, size, dtype=np.uint8))
                image = image.convert("L") if (n * c + i) % 5 == 0 else image
                image.save(folder / f"{wnid}_{i}.JPEG")
