"""Archives of data sets by name: fetched over https where there is https, compared with their SHA-256, and unpacked."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPMessage
from pathlib import Path
from typing import IO
from urllib.error import URLError

from ..errors import InputError, reason
from .bars import bar
from .raw_files import content_of
from .staging import staged

__all__ = ["NotObtained", "obtain"]

SHA256 = {
    "c58f30108f718f92721af3b95e74349a": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    "eb9058c3a382ffc7106e4002c42a8d85": "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    "e26dedcc434d2e4c54c9b2d4a06d8373": "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
    "eb5a983be6a315427106f1b164d9cef3": "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "25c81989df183df01b3e8a0aad5dffbe": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "bef4ecab320f06d8554ea6380940ec79": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "bb300cfdad3c16e7a12a480ee83cd310": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
"""Of CIFAR-10, CIFAR-100, SVHN (train, test) and Fashion-MNIST (train, test: images, labels), by the MD5 that
torchvision's classes have; as PyTorch publishes them in pytorch/vision, torchvision/prototype/datasets/_builtin."""

FASHION_MNIST = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
"""The authors' repository. torchvision's mirror is theirs too, but without https."""
TINY_IMAGENET = ("https://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")
PINS = "SHA256SUMS"
TIMEOUT = 30  # seconds without a byte
MOST = 2**30  # bytes of an archive; the largest has 248 MB


class NotObtained(Exception):
    """A download, or the unpacking of an archive, has failed, and nothing of it is left."""


@dataclass(frozen=True)
class Archive:
    """A file that a data set is unpacked from.

    Args:
        url: where it comes from.
        file: its path in the data folder.
        md5: its MD5, in torchvision.
    """

    url: str
    file: str
    md5: str

    def mistake(self, path: Path) -> str | None:
        """What is wrong with the file at ``path``, by its SHA-256 or, where none is published, its MD5; or None."""
        kind, right = ("sha256", SHA256[self.md5]) if self.md5 in SHA256 else ("md5", self.md5)
        if not os.path.isfile(path):
            return "is missing"
        found = _digest(path, kind)
        return None if found == right else f"has the {kind.upper()} {found}, and {right} is right"


def archives_of(name: str) -> list[Archive]:
    """What a set of that name is downloaded as. torchvision's https addresses, or better ones for its http."""
    from torchvision import datasets

    if name == "tiny_imagenet":
        url, md5 = TINY_IMAGENET
        return [Archive(url, Path(url).name, md5)]
    if name == "svhn":  # over http, with a published SHA-256
        return [Archive(*datasets.SVHN.split_list[split]) for split in ("train", "test")]
    if name == "fashion_mnist":
        files = datasets.FashionMNIST.resources
        return [Archive(FASHION_MNIST + file, f"FashionMNIST/raw/{file}", md5) for file, md5 in files]
    of = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    return [Archive(of.url, of.filename, of.tgz_md5)]


def obtain(name: str, data_dir: Path, download: bool) -> None:
    """Put a set's files into ``data_dir``: from the archives that are there, and for the rest, from the network.

    Each archive is compared with its SHA-256 before it is unpacked: the published one, and the one of ``SHA256SUMS`` in
    ``data_dir``. Where there is neither, its MD5 is, and its SHA-256 is told and added to ``SHA256SUMS``.

    Raises:
        InputError: where an archive has another SHA-256 than ``SHA256SUMS`` has for it.
        NotObtained: where that fails. Nothing has been left then.
    """
    archives = archives_of(name)
    pins = _pins(data_dir / PINS, archives)
    for archive in archives:
        if os.path.isfile(data_dir / archive.file):
            _hold_against_pin(data_dir / archive.file, archive, pins)
    missing = [archive for archive in archives if archive.mistake(data_dir / archive.file)]
    if missing and not download:
        raise NotObtained("downloads are off")
    if missing:
        print(f"downloading {name} into {data_dir}/", file=sys.stderr)
    here = [archive.file for archive in archives if archive not in missing]
    try:
        with staged(data_dir, links=here) as stage:
            for archive in archives:
                if archive in missing:
                    _bring(archive, stage / archive.file, pins)
                _unpack(stage / archive.file)
            unknown = [archive for archive in archives if archive.md5 not in SHA256 and archive.file not in pins]
            new = {archive.file: _digest(stage / archive.file, "sha256") for archive in unknown}
            if new:
                before = content_of(data_dir / PINS, 2**20) if os.path.exists(data_dir / PINS) else b""
                before += b"\n" * (before[-1:] not in (b"", b"\n"))
                lines = "".join(f"{sha256}  {file}\n" for file, sha256 in new.items())
                (stage / PINS).write_bytes(before + lines.encode())
    except InputError:
        raise
    except Exception as error:  # networks, archives and disks fail in many ways: the data are not there
        why = reason(error, 250).removeprefix("<urlopen error ").removesuffix(">")
        raise NotObtained(f"{'the download' if missing else 'unpacking'} failed ({why})") from None
    for archive in unknown:
        how = " came over http and" if archive in missing and archive.url.startswith("http:") else ""
        line = f"{archive.file}{how} was checked by MD5 only; its SHA-256 is {new[archive.file]}"
        print(f"{line}, from now on in {data_dir / PINS}", file=sys.stderr)


def _bring(archive: Archive, path: Path, pins: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fetch(archive.url, path)
    _hold_against_pin(path, archive, pins)
    if mistake := archive.mistake(path):
        raise NotObtained(f"{archive.file} {mistake}")


class _OnlyToHttps(urllib.request.HTTPRedirectHandler):
    """From https to https: what comes after a step over http could come from anyone."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if req.type == "https" and not newurl.lower().startswith("https:"):
            raise URLError(f"{req.full_url} leads to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str, path: Path) -> None:
    """Download ``url`` to ``path``. Nothing else uses the network: a test that must not replaces this function."""
    request = urllib.request.Request(url, headers={"User-Agent": "bilevel-at"})
    opener = urllib.request.build_opener(_OnlyToHttps)
    with opener.open(request, timeout=TIMEOUT) as response, path.open("wb") as file:
        length = response.headers.get("Content-Length", "")
        with bar(path.name, int(length) if length.isdigit() else None, to_stderr=True) as advance:
            while part := response.read(2**20):
                advance(file.write(part))
                if file.tell() > MOST:
                    raise NotObtained(f"{url} has more than {MOST:,} bytes")


def _unpack(path: Path) -> None:
    from torchvision.datasets.utils import extract_archive

    if path.suffix in (".gz", ".zip"):
        extract_archive(str(path), str(path.parent))


def _digest(path: Path, kind: str) -> str:
    if path.stat().st_size > MOST:
        raise InputError(f"{path} has more than {MOST:,} bytes, and no archive that is known has; remove it")
    digest = hashlib.new(kind, usedforsecurity=kind != "md5")
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _pins(path: Path, archives: Sequence[Archive]) -> dict[str, str]:
    """SHA-256 by file, from lines as ``sha256sum`` writes them. Others are passed over where they name no archive."""
    text = content_of(path, 2**20).decode(errors="replace") if os.path.exists(path) else ""
    pins = {}
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line):
            pins[os.path.normpath(match[2])] = match[1].lower()
        elif any(archive.file in line for archive in archives):
            raise InputError(f"{path}, line {number} is not as sha256sum writes it: a SHA-256, two spaces, a file")
    return pins


def _hold_against_pin(path: Path, archive: Archive, pins: dict[str, str]) -> None:
    right = pins.get(archive.file)
    if right is not None and (sha256 := _digest(path, "sha256")) != right:
        raise InputError(
            f"{archive.file} has the SHA-256 {sha256}, and {PINS} has {right} for it: "
            f"remove the archive to have it downloaded again, or, where it is right, the line of {PINS}"
        )
