"""Damage to folders of images and to torchvision's files: what a stranger may have packed into an archive."""

from __future__ import annotations

import functools
import io
import os
import pickle
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fuzzing import MARKUP, damaged_bytes
from PIL import Image, PngImagePlugin

ODD_NAMES = [
    MARKUP.replace("/", ""), "new\nline", "\x1b[2J", b"bad \xff\xfe".decode(errors="surrogateescape"), "-rf", "x" * 200,
    "\u202egnp", "a b", "..jpg", "#", "%s%n", "é", "\t",
]  # fmt: skip


def saved(mode: str, kind: str, size: tuple[int, int] = (40, 50), **options: object) -> bytes:
    """The bytes of a random image of a mode in a format."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, rows: bytes, more: bytes = b"") -> bytes:
    """A grey PNG that says its size, with those rows."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@functools.cache
def text_bomb() -> bytes:
    """A PNG whose profile and text inflate to 200 MB each."""
    zeros = zlib.compress(bytes(200_000_000))
    return png(4, 4, bytes(20), chunk(b"iCCP", b"p\0\0" + zeros) + chunk(b"zTXt", b"t\0\0" + zeros))


def labelled() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text(MARKUP[:20], MARKUP)
    return saved("RGB", "PNG", pnginfo=text)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"

WHOLE = [
    ("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("1", "PNG"),
    ("I", "TIFF"), ("F", "TIFF"), ("RGB", "TIFF"), ("RGB", "BMP"), ("RGB", "PPM"), ("RGB", "WEBP"), ("P", "GIF"),
]  # fmt: skip

STRANGE: list[Callable[[], bytes]] = [
    lambda: png(60_000, 60_000, bytes(10)),
    lambda: png(2**31 - 1, 2**31 - 1, bytes(10)),
    lambda: png(0, 0, b""),
    lambda: png(1, 60_000, bytes(120_000)),
    lambda: png(60_000, 1, bytes(60_001)),
    lambda: png(9_000, 9_000, bytes(100)),
    text_bomb,
    labelled,
    lambda: EPS,
    lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    lambda: b"<html><script>alert(1)</script>",
    lambda: b"",
    lambda: b"P6\n99999 99999\n255\n",
    lambda: b"P5\n1 1\n99999999999999999999\n\0",
    lambda: b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(20),
    lambda: pickle.dumps(print),
]  # fmt: skip


def image_bytes(r: random.Random) -> bytes:
    """What stands in a file that is named as an image."""
    if r.random() < 0.3:
        return r.choice(STRANGE)()
    content = saved(*r.choice(WHOLE))
    return content if r.random() < 0.1 else damaged_bytes(content, r)


def other_kind(path: Path, r: random.Random) -> str:
    """Put something that is no plain file in place of the one at ``path``; what."""
    if path.is_dir() and not path.is_symlink():
        return "a folder already"
    path.unlink(missing_ok=True)
    makers: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "a folder": path.mkdir,
        "a pipe": lambda: os.mkfifo(path),
        "a link to nothing": lambda: path.symlink_to("nowhere"),
        "a link to itself": lambda: path.symlink_to(path.name),
        "a link to a device": lambda: path.symlink_to("/dev/zero"),
        "a link to the folder above": lambda: path.symlink_to(".."),
        "a link to the root": lambda: path.symlink_to("/"),
        "10 GB of holes": lambda: (path.touch(), os.truncate(path, 10**10)),
    }
    what = r.choice(sorted(makers))
    makers[what]()
    return what


def add(folder: Path, r: random.Random) -> str:
    """Put something into a class folder, or beside it; what."""
    name = r.choice(ODD_NAMES)
    how = r.choice(["image", "other", "class", "empty class", "deep", "two links", "pipe"])
    if how in ("image", "other"):
        (folder / (name + (".png" if how == "image" else ".txt"))).write_bytes(image_bytes(r))
    elif how == "class":
        (folder.parent / name).mkdir()
        (folder.parent / name / "x.PNG").write_bytes(saved("RGB", "PNG"))
    elif how == "empty class":
        (folder.parent / name).mkdir()
    elif how == "deep":
        for level in range(300):
            (folder / Path(*["d"] * level)).mkdir(exist_ok=True)
    elif how == "two links":  # each doubles the paths that lead to an image, for ever
        (folder / "a").symlink_to(".")
        (folder / "b").symlink_to(".")
    else:
        os.mkfifo(folder / f"{name}.jpg")
    return f"{how} {name!a}"
