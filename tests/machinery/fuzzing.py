"""Damage for the fuzz tests: what a stranger, or a disk, may have made of a file of a run, of data, or of weights."""

from __future__ import annotations

import functools
import io
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

MARKUP = '<script>alert(1)</script> [bold red]x[/] \x1b[31m \u202e $x_{^2$ & "q"'
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 10**9, 10**12, 10**30, -(10**30), 1e308, -1e308, 1e-320, 0.5,
    float("nan"), float("inf"), float("-inf"), "", "x", "x" * 10_000, "0", "nan", "é\ud800", MARKUP, "../../etc/passwd",
    "/dev/zero", "\0", "-1", [], [[]], {}, {"": {}}, [None], [1, 2, 3], {"a": [1]}, [MARKUP], {MARKUP: MARKUP},
    "clean", "best", "2026-11-21", "1" * 5000,
]  # fmt: skip


def text_bytes(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def damaged_bytes(content: bytes, r: random.Random) -> bytes:
    """Truncated, flipped, spliced, or other bytes altogether."""
    how = r.choice(["cut", "flip", "insert", "zero", "random", "empty", "twice", "reverse"])
    data = bytearray(content)
    place = r.randrange(len(data)) if data else 0
    if how == "cut":
        return bytes(data[:place])
    if how == "flip":
        for _ in range(r.choice([1, 1, 2, 20])):
            if data:
                data[r.randrange(len(data))] ^= 1 << r.randrange(8)
        return bytes(data)
    if how == "insert":
        return bytes(data[:place] + r.randbytes(r.choice([1, 3, 100])) + data[place:])
    if how == "zero":
        end = min(len(data), place + r.choice([1, 10, 1000]))
        return bytes(data[:place] + bytes(end - place) + data[end:])
    return {"random": r.randbytes(r.choice([1, 10, 5000])), "empty": b"", "twice": content * 2}.get(how, content[::-1])


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in nested dictionaries and lists."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deep for key, part in parts for deep in places(part, (*path, key)))]


def damaged_json(value: Any, r: random.Random) -> Any:
    """The value with a part replaced, removed, added or moved."""
    value = json.loads(json.dumps(value))
    path = r.choice(places(value))
    new = r.choice(VALUES)
    if not path:
        return new
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    how = r.choice(["replace", "replace", "replace", "remove", "add"])
    if how == "replace":
        parent[path[-1]] = new
    elif how == "remove":
        del parent[path[-1]]
    elif isinstance(parent, dict):
        parent[r.choice([MARKUP, "", "best", "clean", "epsilon", "pgd-50-10@1e400", "x" * 3000])] = new
    else:
        parent.insert(0, new)
    return value


def damaged_text(content: bytes, r: random.Random) -> bytes:
    """JSON, or lines of it, with a part changed; nested deeply; of bad UTF-8; or damaged as bytes."""
    how = r.choice(["part"] * 12 + ["deep", "utf8", "bom", "number", "twice", "bytes"])
    if how == "deep":
        depth = r.choice([900, 5000, 200_000])
        return b"[" * depth + b"]" * depth if r.random() < 0.5 else b'{"a":' * depth + b"1" + b"}" * depth
    if how == "number":
        return content.replace(b": 1", b": " + b"9" * r.choice([400, 5000, 100_000]), 1)
    if how == "utf8":
        place = r.randrange(len(content) + 1)
        return content[:place] + b"\xff\xfe\xc3(" + content[place:]
    if how == "bom":
        return b"\xef\xbb\xbf" + content
    if how == "twice":
        return content + content
    try:
        lines = [json.loads(line) for line in content.splitlines()]
        if how == "part":
            place = r.randrange(len(lines))
            lines[place] = damaged_json(lines[place], r)
            return b"\n".join(map(text_bytes, lines)) + b"\n"
    except ValueError:
        try:
            if how == "part":
                return text_bytes(damaged_json(json.loads(content), r)) + b"\n"
        except ValueError:
            pass
    return damaged_bytes(content, r)


def header(shape: str, kind: str = "<f4", version: int = 1) -> bytes:
    """An array's bytes with a header that says whatever it says, and hardly anything after it."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    length = struct.pack("<H", len(text)) if version == 1 else struct.pack("<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + b"\0" * 64


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def strange_array(like: np.ndarray, r: random.Random) -> bytes:
    """Another array in place of ``like``, as bytes of an .npy file."""
    n = len(like) if like.ndim else 1
    makers: list[Callable[[], bytes]] = [
        lambda: npy(like[: n // 2] if like.ndim else like),
        lambda: npy(like.astype(np.float64) * np.nan if like.dtype.kind in "iufb" else like),
        lambda: npy(np.zeros(like.shape, "m8[s]")),
        lambda: npy(np.zeros(like.shape, "M8[D]")),
        lambda: npy(np.zeros(like.shape, "c16")),
        lambda: npy(np.full(like.shape, "text")),
        lambda: npy(np.zeros(like.shape, [("a", "i4"), ("b", "f8")])),
        lambda: npy(np.array([{"a": 1}, print], dtype=object)),
        lambda: npy(np.zeros(0, like.dtype)),
        lambda: npy(np.array(5)),
        lambda: npy(np.zeros((0, 3))),
        lambda: npy(like[None]),
        lambda: npy((like.astype(np.float64) * 1e30).astype(np.float64) if like.dtype.kind in "iufb" else like),
        lambda: npy(np.full(like.shape, -1, np.int64)),
        lambda: npy(np.full(like.shape, 2**62, np.int64)),
        lambda: npy(np.full(like.shape, 2**64 - 1, np.uint64)),
        lambda: header("(1000000000000,)"),
        lambda: header("(1000000000000000000000000000000,)"),
        lambda: header("(-5,)"),
        lambda: header("(100000, 1000000)", "|u1"),
        lambda: header("(4294967296, 4294967296, 4294967296)", "<f8"),
        lambda: header("(3,)", "|O"),
        lambda: header("(3,)", "<U100000000"),
        lambda: header("(" * 2000 + ")" * 2000),
        lambda: header("(3,)", "V99999999999999"),
        lambda: b"",
        lambda: damaged_bytes(npy(like), r),
    ]
    return r.choice(makers)()


@functools.cache
def bomb() -> tuple[bytes, int]:
    """(an array of 3 GB of zeros, deflated to 3 MB; its bytes when inflated)."""
    start = header("(750000000,)")[:-64]
    pack = zlib.compressobj(wbits=-15)
    first = pack.compress(start) + pack.flush(zlib.Z_FULL_FLUSH)
    million = pack.compress(bytes(10**6)) + pack.flush(zlib.Z_FULL_FLUSH)
    return first + million * 3000 + pack.flush(), len(start) + 3 * 10**9


def parts_of(archive: bytearray, mark: bytes) -> list[int]:
    """Where a mark of the zip format stands."""
    return [place.start() for place in re.finditer(re.escape(mark), archive)]


def damaged_npz(content: bytes, r: random.Random) -> bytes:
    """An archive with an array replaced, missing, added, huge when inflated, or encrypted; or damaged as bytes."""
    how = r.choice(["array"] * 8 + ["missing", "extra", "bomb", "encrypted", "bytes", "bytes", "names"])
    if how == "bytes":
        return damaged_bytes(content, r)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = r.choice(sorted(parts))
    if how == "array":
        parts[name] = strange_array(np.load(io.BytesIO(parts[name]), allow_pickle=False), r)
    elif how == "missing":
        del parts[name]
    elif how == "extra":
        parts[r.choice(["../../evil.npy", "x" * 300 + ".npy", "\u202e.npy"])] = parts[name]
    elif how == "names":
        parts = {r.choice([key, key.replace(".npy", ""), key.upper()]): part for key, part in parts.items()}
    elif how == "bomb":
        parts[name], size = bomb()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for key, part in parts.items():
            archive.writestr(key, part)
    made = bytearray(file.getvalue())
    if how == "bomb":  # say that the part is deflated, and how large it is when inflated
        for mark, method, inflated in ((b"PK\x03\x04", 8, 22), (b"PK\x01\x02", 10, 24)):
            for place in parts_of(made, mark):
                if made.find(name.encode(), place) - place in (30, 46):
                    made[place + method] = 8
                    made[place + inflated : place + inflated + 4] = struct.pack("<I", size)
    if how == "encrypted":
        for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            for place in parts_of(made, mark):
                made[place + offset] |= 1
    return bytes(made)


def strange_value(value: Any, r: random.Random) -> Any:
    """In place of a part of a checkpoint."""
    tensor = value if isinstance(value, torch.Tensor) else torch.zeros(3)
    itself: dict[str, Any] = {}
    itself["itself"] = itself
    deep: Any = 1
    for _ in range(300):
        deep = [deep]
    huge = torch.zeros(1).expand(10**12)  # of one number on the disk
    return r.choice([
        None, 1, -1, 10**12, 2.5, float("nan"), "x", MARKUP, [], {}, itself, deep, {1: 2}, {None: huge}, (1, 2), huge,
        torch.zeros(0), torch.zeros(()), tensor.double(), tensor.half(), tensor.to(torch.complex64), tensor[None],
        torch.full_like(tensor.float(), torch.nan), torch.zeros(1, 1).expand(10**6, 10**7),
        torch.zeros(4, dtype=torch.bool), torch.zeros(5, dtype=torch.int64), torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8), torch.zeros(3, device="meta"),
        torch.nn.Parameter(torch.zeros(2)), {"values": torch.zeros(1).expand(10**11), "known": torch.ones(1).bool()},
    ])  # fmt: skip


def damaged_checkpoint(content: bytes, r: random.Random) -> bytes:
    """A checkpoint with a part replaced, removed or added; or damaged as bytes."""
    how = r.choice(["part"] * 6 + ["remove", "add", "bytes", "bytes"])
    if how == "bytes":
        return damaged_bytes(content, r)
    state = torch.load(io.BytesIO(content), weights_only=True)
    path = r.choice([p for p in places_of(state) if p])
    parent = state
    for key in path[:-1]:
        parent = parent[key]
    if how == "part":
        parent[path[-1]] = strange_value(parent[path[-1]], r)
    elif how == "remove":
        del parent[path[-1]]
    elif isinstance(parent, dict):
        parent[r.choice([MARKUP, 5, None, "average", "format", "x"])] = strange_value(None, r)
    else:
        parent.append(strange_value(None, r))
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def places_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deep for key, part in parts for deep in places_of(part, (*path, key)))]


def damaged(name: str, content: bytes, r: random.Random) -> bytes:
    """The file of that name with damage that suits it."""
    kinds = {".json": damaged_text, ".jsonl": damaged_text, ".npz": damaged_npz, ".pt": damaged_checkpoint}
    return next((make for end, make in kinds.items() if name.endswith(end)), damaged_bytes)(content, r)
