"""Data: every named set from torchvision's own files, downloads that fail, and batches in memory and from files."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import shutil
import signal
import sys
import tarfile
import textwrap
import time
import urllib.error
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets, transforms
from torchvision.transforms import functional as vision

import bilevel_at as ba
from bilevel_at.batch import CropFlip
from bilevel_at.data import Images, Loader, Streamed, load_data, named

RNG = np.random.default_rng
FETCH = named.fetch


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test in a directory of its own, and without a network."""

    def forbidden(name, folder):
        raise AssertionError(f"{name} would have been downloaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(named, "fetch", forbidden)


@pytest.fixture
def network(monkeypatch):
    """``network(write)``: what a download does, given the folder it writes into."""

    def says(write):
        monkeypatch.setattr(named, "fetch", lambda name, folder: write(folder))

    return says


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


# --- sets in torchvision's own formats ------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_what_torchvision_unpacked(name, monkeypatch):
    written = write_cifar("data", name, monkeypatch)
    before = everything()
    train, test = load_data(name)
    agrees(train, *written["train"])
    agrees(test, *written["test"])
    assert (train.shape, train.classes, everything()) == ((3, 32, 32), 10, before)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_of_another_checksum_is_not_unpickled(name):
    class Evil:
        def __reduce__(self):
            return (Path("evil").touch, ())

    write_cifar("data", name)
    for file in Path("data").rglob("*"):
        if file.is_file():
            file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ba.InputError, match="is not in data/, or not whole, and downloads are off; put cifar10*.npz"):
        load_data(name, download=False)
    assert not Path("evil").exists()


def test_svhn_from_its_mat_files(monkeypatch):
    written = write_svhn("data", monkeypatch)
    train, test = load_data("svhn", download=False)
    agrees(train, *written["train"])  # among them the zeros, which the files call 10
    agrees(test, *written["test"])
    with open("data/test_32x32.mat", "ab") as file:
        file.write(b"x")
    with pytest.raises(ba.InputError, match="or train_32x32.mat and test_32x32.mat"):
        load_data("svhn", download=False)


def test_fashion_mnist_from_its_idx_files():
    written = write_fashion("data")
    train, test = load_data("fashion_mnist")
    agrees(train, *written["train"])
    agrees(test, *written["test"])
    assert train.shape == (1, 28, 28)
    images = Path("data/FashionMNIST/raw/train-images-idx3-ubyte")
    for damaged in (b"", b"hello", images.read_bytes()[:1000]):
        images.write_bytes(damaged)
        with pytest.raises(ba.InputError, match="or FashionMNIST/raw/ with its four idx files"):
            load_data("fashion_mnist", download=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_tiny_imagenet_from_its_folder(workers, capsys):
    written = write_tiny("data")
    train, test = load_data("tiny_imagenet", workers=workers)
    agrees(train, *written["train"])
    agrees(test, *written["test"])
    assert train.shape == (3, 64, 64) and capsys.readouterr() == ("", "")


def test_mistakes_in_tiny_imagenet():
    write_tiny("data")
    folder = Path("data/tiny-imagenet-200")
    Image.new("RGB", (65, 64)).save(folder / "val/images/val_3.JPEG")
    line = r"val_3.JPEG cannot be read as an image: it is 65×64, and Tiny-ImageNet's images are 64×64"
    for workers in (0, 2):
        with pytest.raises(ba.InputError, match=line) as error:
            load_data("tiny_imagenet", workers=workers)
        assert "\n" not in str(error.value)
    (folder / "val/val_annotations.txt").write_text("val_0.JPEG\tn999\n")
    with pytest.raises(ba.InputError, match="names the class 'n999', for which .*train has no folder"):
        load_data("tiny_imagenet")
    shutil.rmtree(folder / "train")
    with pytest.raises(ba.InputError, match="or tiny-imagenet-200.zip"):
        load_data("tiny_imagenet", download=False)


# --- downloads ------------------------------------------------------------------------------------------------------

TORCHVISION = ["fashion_mnist", "cifar10", "cifar100", "svhn", "tiny_imagenet"]


@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (urllib.error.URLError("[Errno -2] Name or service not known"), "[Errno -2] Name or service not known"),
        (TimeoutError("timed out"), "timed out"),
        (RuntimeError("Error downloading x:\nTried http://y, got:\n<urlopen error no route>\n"), "no route"),
        (RuntimeError("File not found or corrupted."), "File not found or corrupted."),
        (EOFError(), "EOFError"),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_a_failed_download_leaves_nothing(name, error, said, there, network):
    def write(folder):
        Path(folder, "half", "made").mkdir(parents=True)
        Path(folder, "half", "file").touch()
        raise error

    network(write)
    if there:
        Path("data/mine").mkdir(parents=True)
    before = everything()
    with pytest.raises(ba.InputError) as caught:
        load_data(name, "data")
    line = str(caught.value)
    assert everything() == before
    assert "\n" not in line and len(line) < 400
    assert f"the download failed ({said}); put {name}.npz (arrays x_train, y_train, x_test, y_test) into data/" in line


def test_an_interrupted_download_leaves_nothing(network):
    def write(folder):
        Path(folder, "file").touch()
        raise KeyboardInterrupt

    network(write)
    with pytest.raises(KeyboardInterrupt):
        load_data("svhn")
    assert everything() == []


def test_downloads_that_are_off_are_not_tried():
    for name in TORCHVISION:
        with pytest.raises(ba.InputError, match="and downloads are off; put"):
            load_data(name, download=False)
    Path("data").touch()
    with pytest.raises(ba.InputError, match="the data folder data is a file"):
        load_data("svhn")


def test_what_was_downloaded_is_loaded_and_stays(network, monkeypatch, capsys):
    written = write_cifar("source", "cifar10", monkeypatch)
    network(lambda folder: shutil.copytree("source", folder, dirs_exist_ok=True))
    Path("deep/data/cifar-10-batches-py").mkdir(parents=True)
    Path("deep/data/cifar-10-batches-py/data_batch_1").write_text("half of it")
    Path("deep/data/other").touch()
    train, _ = load_data("cifar10", "deep/data")
    agrees(train, *written["train"])
    assert "downloading cifar10 into deep/data/" in capsys.readouterr().err
    copied = [f"deep/data{p.removeprefix('source')}" for p in everything("source")]
    assert everything("deep/data") == sorted([*copied, "deep/data/other"])
    network(lambda folder: pytest.fail("a second time"))
    again, _ = load_data("cifar10", "deep/data")
    assert again.sha256() == train.sha256()


def test_a_download_that_is_something_else(network):
    network(lambda folder: Path(folder, "page.html").touch())
    with pytest.raises(ba.InputError, match="what was downloaded cannot be read; put svhn.npz"):
        load_data("svhn", "data")


def refuse(*args, **kwargs):
    raise urllib.error.URLError("no network in tests")


def test_archives_that_are_there_are_unpacked_without_a_network(monkeypatch):
    monkeypatch.setattr(named, "fetch", FETCH)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    Path("data").mkdir()

    written = write_cifar("source", "cifar10", monkeypatch)
    with tarfile.open("data/cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add("source/cifar-10-batches-py", "cifar-10-batches-py")
    with pytest.raises(ba.InputError, match=r"the download failed \(no network in tests\)"):
        load_data("cifar10")  # its checksum is wrong
    assert everything("data") == ["data/cifar-10-python.tar.gz"]
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5("data/cifar-10-python.tar.gz"))
    agrees(load_data("cifar10", download=False)[0], *written["train"])

    written = write_fashion("data", zipped=True)
    of = datasets.FashionMNIST
    sums = [(file, md5(f"data/FashionMNIST/raw/{file}")) for file, _ in of.resources]
    monkeypatch.setattr(of, "resources", sums)
    agrees(load_data("fashion_mnist", download=False)[1], *written["test"])

    written = write_tiny("source")
    with zipfile.ZipFile("data/tiny-imagenet-200.zip", "w") as archive:
        for path in Path("source/tiny-imagenet-200").rglob("*"):
            archive.write(path, path.relative_to("source"))
    monkeypatch.setattr(named, "TINY_IMAGENET", (named.TINY_IMAGENET[0], md5("data/tiny-imagenet-200.zip")))
    agrees(load_data("tiny_imagenet", download=False, workers=0)[0], *written["train"])

    names = {p.name for p in Path("data").iterdir()}
    archives = {"cifar-10-python.tar.gz", "tiny-imagenet-200.zip"}
    assert names == {*archives, "cifar-10-batches-py", "FashionMNIST", "tiny-imagenet-200"}
    assert not any(p.is_symlink() for p in Path("data").rglob("*"))


def test_the_npz_comes_first(monkeypatch):
    write_fashion("data")
    x, y = pictures(30, seed=9)
    np.savez("data/fashion_mnist.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    agrees(load_data("fashion_mnist")[1], x[:10], y[:10])


def test_a_single_array_is_said_to_be_one():
    np.save("one.npy", np.zeros(3))
    Path("one.npy").rename("one.npz")
    with pytest.raises(ba.InputError, match=r"^one.npz is a single array; an .npz with x_train"):
        load_data("one.npz")


# --- image sets -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("workers", [0, 2])
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


# --- batches --------------------------------------------------------------------------------------------------------


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
        assert torch.equal((255 * batch.x).round() / 255, batch.x) and batch.check(3) is batch


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


def test_batches_in_memory_are_what_they_were():
    """The draws of an epoch, stated once more: a resumed run of an earlier version must see the same batches."""
    images = Images(torch.from_numpy(pictures(23)[0]).permute(0, 3, 1, 2).contiguous(), torch.arange(23) % 10, 10)
    generator = torch.Generator().manual_seed(1_000_003 * 7 + 2)
    order = torch.randperm(23, generator=generator)
    for batch, index in zip(Loader(images, 8, 7, "crop-flip").epoch(2), order.split(8), strict=True):
        offsets = torch.randint(0, 9, (2, len(index)), generator=generator)
        flip = torch.rand(len(index), generator=generator) < 0.5
        assert torch.equal(batch.index, index) and torch.equal(batch.y, images.y[index])
        padded = torch.nn.functional.pad(images.x[index].float() / 255, (4, 4, 4, 4))
        for i, (top, left) in enumerate(offsets.T.tolist()):
            x = padded[i, :, top : top + 32, left : left + 32]
            assert torch.equal(batch.x[i], x.flip(-1) if flip[i] else x)
        assert (batch.view.top.tolist(), batch.view.left.tolist()) == tuple(offsets.tolist())


@given(
    shape=st.tuples(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9)),
    padding=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_crop_and_flip_are_torchvision_s(shape, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    view = CropFlip.draw(len(x), padding, generator, x.device)
    height, width = shape[2:]
    expected = []
    for image, top, left, flip in zip(x, view.top.tolist(), view.left.tolist(), view.flip.tolist(), strict=True):
        window = vision.crop(vision.pad(image, [padding] * 4), top, left, height, width)
        expected.append(vision.hflip(window) if flip else window)
    seen = view.apply(view.pad(x))
    assert seen.dtype == torch.uint8 and torch.equal(seen, torch.stack(expected))
    assert torch.equal(view.apply(view.pad(x.float() / 255)), torch.stack(expected).float() / 255)


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
