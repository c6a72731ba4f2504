"""Downloads, which fail in many ways and then leave nothing."""

from __future__ import annotations

import email
import hashlib
import io
import shutil
import tarfile
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import pytest
from data_files import FETCH, agrees, everything, md5, write_cifar, write_svhn
from torchvision import datasets

import bilevel_at as ba
from bilevel_at.data import downloads, load_data

pytestmark = pytest.mark.usefixtures("without_network")


@pytest.fixture
def network(monkeypatch):
    """``network(write)``: what a download does, given the address and the file it writes to."""
    return partial(monkeypatch.setattr, downloads, "fetch")


TORCHVISION = ["fashion_mnist", "cifar10", "cifar100", "svhn", "tiny_imagenet"]


@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (urllib.error.URLError("[Errno -2] Name or service not known"), "[Errno -2] Name or service not known"),
        (TimeoutError("timed out"), "timed out"),
        (RuntimeError("File not found or corrupted."), "File not found or corrupted."),
        (EOFError(), "EOFError"),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_a_failed_download_leaves_nothing(name, error, said, there, network):
    def write(url, path):
        path.with_name("half").mkdir()
        path.write_text("half")
        raise error

    network(write)
    if there:
        Path("data/mine").mkdir(parents=True)
    before = everything()
    with pytest.raises(ba.InputError) as caught:
        load_data(name, "data")
    line = str(caught.value)
    assert everything() == before
    assert "\n" not in line and len(line) < 500
    assert f"the download failed ({said}); put {name}.npz (arrays x_train, y_train, x_test, y_test) into data/" in line


def test_an_interrupted_download_leaves_nothing(network):
    def write(url, path):
        path.touch()
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
    written = packed_cifar(monkeypatch)
    network(lambda url, path: shutil.copyfile("cifar-10-python.tar.gz", path))
    Path("deep/data/cifar-10-batches-py").mkdir(parents=True)
    Path("deep/data/cifar-10-batches-py/data_batch_1").write_text("half of it")
    Path("deep/data/other").touch()
    train, _ = load_data("cifar10", "deep/data")
    agrees(train, *written["train"])
    assert "downloading cifar10 into deep/data/" in capsys.readouterr().err
    copied = [f"deep/data{p.removeprefix('source')}" for p in everything("source")]
    more = ["deep/data/SHA256SUMS", "deep/data/cifar-10-python.tar.gz", "deep/data/other"]
    assert everything("deep/data") == sorted([*copied, *more])
    network(lambda url, path: pytest.fail("a second time"))
    again, _ = load_data("cifar10", "deep/data")
    assert again.sha256() == train.sha256()


def test_a_download_that_is_something_else(network):
    network(lambda url, path: path.write_text("<html>"))
    with pytest.raises(ba.InputError, match=r"train_32x32.mat has the SHA256 \w+, and 435e94d\w+ is right\); put svhn"):
        load_data("svhn", "data")
    assert everything() == []


def packed_cifar(monkeypatch):
    """cifar-10-python.tar.gz in this directory, with the checksums that torchvision is given; what is in it."""
    written = write_cifar("source", "cifar10", monkeypatch)
    with tarfile.open("cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add("source/cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5("cifar-10-python.tar.gz"))
    return written


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture
def from_here(monkeypatch):
    """A made-up CIFAR-10 that is really downloaded, from this directory by a file:// address."""
    packed_cifar(monkeypatch)
    monkeypatch.setattr(downloads, "fetch", FETCH)
    monkeypatch.setattr(datasets.CIFAR10, "url", Path("cifar-10-python.tar.gz").absolute().as_uri())


def test_an_archive_of_unknown_sha256_is_told_and_pinned(from_here, capsys):
    load_data("cifar10")
    found = sha256("cifar-10-python.tar.gz")
    line = f"cifar-10-python.tar.gz was checked by MD5 only; its SHA-256 is {found}, from now on in data/SHA256SUMS"
    assert capsys.readouterr().err.splitlines() == ["downloading cifar10 into data/", line]
    assert Path("data/SHA256SUMS").read_text() == f"{found}  cifar-10-python.tar.gz\n"
    shutil.rmtree("data/cifar-10-batches-py")
    load_data("cifar10", download=False)  # unpacked again, and compared
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("where", ["in the folder", "in the download"])
def test_an_archive_that_differs_from_its_pin_is_not_unpacked(where, from_here, monkeypatch):
    Path("data").mkdir()
    Path("data/SHA256SUMS").write_text(f"{64 * '0'}  other\n{64 * 'a'}  cifar-10-python.tar.gz\n")
    if where == "in the folder":
        shutil.copy("cifar-10-python.tar.gz", "data")
    before, found = everything(), sha256("cifar-10-python.tar.gz")
    line = f"cifar-10-python.tar.gz has the SHA-256 {found}, and SHA256SUMS has {64 * 'a'} for it: remove the archive"
    with pytest.raises(ba.InputError, match=line):
        load_data("cifar10")
    assert everything() == before
    Path("data/SHA256SUMS").write_text(f"{64 * '0'}  other\n{found} *cifar-10-python.tar.gz\n")
    assert len(load_data("cifar10")[0]) == 150
    Path("data/SHA256SUMS").write_text(f"{64 * 'a'}  ./cifar-10-python.tar.gz\n")  # as find writes it
    shutil.rmtree("data/cifar-10-batches-py")
    with pytest.raises(ba.InputError, match=line):
        load_data("cifar10")
    for harmless in (b"", b"# a comment\n\n", b"\xff\xfe", f"SHA256 (mine) = {found}".encode(), b"\0"):
        Path("data/SHA256SUMS").write_bytes(harmless)
        assert len(load_data("cifar10")[0]) == 150
        shutil.rmtree("data/cifar-10-batches-py")
        assert Path("data/SHA256SUMS").read_bytes().startswith(harmless)
    for wrong in (f"{found[1:]}  cifar-10-python.tar.gz", f"SHA256 (cifar-10-python.tar.gz) = {found}"):
        Path("data/SHA256SUMS").write_text(wrong)
        shutil.rmtree("data/cifar-10-batches-py", ignore_errors=True)
        with pytest.raises(ba.InputError, match="data/SHA256SUMS, line 1 is not as sha256sum writes it"):
            load_data("cifar10")


def test_a_published_sha256_decides_and_not_the_md5(from_here, monkeypatch, capsys):
    """A file of the right MD5 and another SHA-256 is what a collision would be."""
    monkeypatch.setitem(downloads.SHA256, datasets.CIFAR10.tgz_md5, 64 * "b")
    with pytest.raises(ba.InputError, match=rf"has the SHA256 {sha256('cifar-10-python.tar.gz')}, and {64 * 'b'} is"):
        load_data("cifar10")
    assert not Path("data").exists()
    monkeypatch.setitem(downloads.SHA256, datasets.CIFAR10.tgz_md5, sha256("cifar-10-python.tar.gz"))
    load_data("cifar10")
    assert "MD5" not in capsys.readouterr().err and not Path("data/SHA256SUMS").exists()


def test_every_archive_but_tiny_imagenet_has_a_published_sha256_and_all_but_svhn_https():
    """Of the installed torchvision: a release with other archives is noticed."""
    archives = [archive for name in TORCHVISION for archive in downloads.archives_of(name)]
    assert {a.file for a in archives if a.md5 not in downloads.SHA256} == {"tiny-imagenet-200.zip"}
    assert {a.md5 for a in archives} >= {*downloads.SHA256}
    assert {a.file for a in archives if not a.url.startswith("https:")} == {"train_32x32.mat", "test_32x32.mat"}


def test_http_is_told_where_no_sha256_is_published(network, monkeypatch, capsys):
    written = write_svhn("source", monkeypatch)
    network(lambda url, path: shutil.copy(f"source/{path.name}", path))
    agrees(load_data("svhn")[0], *written["train"])
    lines = capsys.readouterr().err.splitlines()
    for line, file in zip(lines[1:], ("train_32x32.mat", "test_32x32.mat"), strict=True):
        assert line.startswith(
            f"{file} came over http and was checked by MD5 only; its SHA-256 is {sha256('data/' + file)}"
        )


def test_https_is_not_given_up(monkeypatch):
    """torchvision would try http where https fails."""
    ports = []

    def connect(address, *args, **options):
        ports.append(address[1])
        raise OSError("no network in tests")

    monkeypatch.setattr("socket.create_connection", connect)
    with pytest.raises(OSError, match="no network in tests"):
        FETCH("https://example.com/archive.zip", Path("archive.zip"))
    assert ports == [443]


@pytest.mark.parametrize("target", ["http://example.com/b", "ftp://example.com/b", "HTTPS://example.com/b"])
def test_https_leads_to_https_only(target, monkeypatch):
    class Redirects(urllib.request.HTTPSHandler):
        def https_open(self, request):
            headers = email.message_from_string(f"Location: {target}\n\n")
            if request.full_url != "https://example.com/a":
                raise urllib.error.URLError("followed")
            return self.parent.error("http", request, io.BytesIO(), 302, "Found", headers)

    build = urllib.request.build_opener
    monkeypatch.setattr(urllib.request, "build_opener", lambda *handlers: build(Redirects, *handlers))
    line = "followed" if target.startswith("HTTPS") else "https://example.com/a leads to .*, which is not https"
    with pytest.raises(urllib.error.URLError, match=line):
        FETCH("https://example.com/a", Path("a"))
    assert everything() == []
