"""Weights to share: a ``.safetensors`` file of plain numbers that says itself what network they are of.

The file's metadata has, under ``bilevel_at``, JSON with the network's name, input shape, classes and normalisation, the
data, the threat, the problem and the solver, and versions. A reader that knows nothing of this library has the tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, reason, shown
from ..models import TRAINED, build_model
from .checkpoints import weights
from .described import described
from .directory import RunDir
from .provenance import today
from .record import read

__all__ = ["SUFFIX", "card", "export", "file_of", "is_shared", "load_shared", "read_shared"]

SUFFIX = ".safetensors"
KEY = "bilevel_at"
OF_NETWORK = ("model", "activation", "shape", "classes")
OF_TRAINING = ("file_sha256", "problem", "solver", "lower", "constraint", "versions")
PRIVATE = ("data_dir", "extra", "device")  # options that name places of a machine
MOST_HEADER = 2**22  # bytes; that of a network of a thousand layers has 2^17


def is_shared(path: str | Path) -> bool:
    """Whether this is the name of a network in the package, or a file of weights to share; a directory is a run."""
    return not Path(path).is_dir() and (str(path) in TRAINED or Path(path).suffix == SUFFIX)


def file_of(name: str | Path) -> Path:
    """The file of a network in the package, or else the path itself."""
    return TRAINED[str(name)] if str(name) in TRAINED and not Path(name).exists() else Path(name)


def export(
    run_dir: str | Path,
    path: str | Path,
    which: str = "best",
    half: bool = False,
    results: Mapping[str, Any] | None = None,
) -> Path:
    """Write the weights of a run to a ``.safetensors`` file, with what describes the network.

    Args:
        run_dir: the run directory.
        path: the file; it is replaced where it exists.
        which: "best", "last" or "last_good".
        half: store weights in 16 bits; the file is half as large, and they are rounded.
        results: attack -> numbers, to be told with the weights. By default those of the checkpoint's ``results.json``,
            or none where ``half`` rounds the weights that they are of.

    Returns:
        The path.

    Raises:
        InputError: if the directory is no run, the checkpoint is missing, or the file cannot be written.
    """
    path, run = Path(path), RunDir(run_dir)
    if path.suffix != SUFFIX:
        raise InputError(f"{path} does not end in {SUFFIX}, which is how a file of weights to share is recognised")
    config = run.config()
    described(run_dir, config)  # InputError where it describes no network
    try:
        state = weights(run.checkpoint(which, "cpu", memories=False))
    except KeyError:
        raise InputError(f"{run_dir}/{which}.pt has no weights") from None
    record = read(run_dir)
    if results is None:
        results = {} if half else {name: _numbers(entry) for name, entry in record.under_threat(which).items()}
    options = record.part("options")
    about = {
        **{name: config[name] for name in (*OF_NETWORK, *OF_TRAINING) if name in config},
        "file": Path(str(config.get("file"))).name,
        "data": options.get("data"),
        "options": {name: value for name, value in options.items() if name not in PRIVATE},
        "checkpoint": which,
        "normalisation": {name: state[name].flatten().tolist() for name in ("mean", "std") if name in state},
        "results": dict(results),
        "exported": today(),
        "bilevel-at": metadata.version("bilevel-at"),
    }
    stored = {name: _stored(tensor, half) for name, tensor in state.items()}
    content = _safetensors().save(stored, {"format": "pt", KEY: json.dumps(about, ensure_ascii=False)})
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
    return path


def _numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("accuracy", "n", "epsilon", "norm") if key in entry}


def _stored(tensor: Tensor, half: bool) -> Tensor:
    rounded = tensor.half() if half and tensor.is_floating_point() else tensor
    return rounded.detach().cpu().contiguous().clone()  # names that share memory are not allowed in the file


def _safetensors() -> Any:
    try:
        from safetensors import torch as safetensors
    except ImportError:
        raise InputError("files of weights to share need safetensors: pip install safetensors") from None
    return safetensors


def read_shared(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a ``.safetensors`` file on the CPU, those of 16 bits as float32; and what it says of them.

    No more is read than the file has: a header that says more is refused before anything is reserved.

    Args:
        path: the file, or the name of a network in the package.

    Raises:
        InputError: if it is missing, damaged, or no such file.
    """
    file = file_of(path)
    if not file.is_file():
        raise InputError(f"{path} does not exist; give a {SUFFIX} file, or one of {', '.join(TRAINED)}")
    safetensors = _safetensors()
    try:
        with file.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
            if not 2 <= header <= min(MOST_HEADER, file.stat().st_size - 8):
                raise ValueError(f"its header is said to have {header:,} bytes")
            fields = json.loads(opened.read(header))
        tensors: dict[str, Tensor] = safetensors.load_file(file)
        said = fields.get("__metadata__", {}).get(KEY, "{}")
        about = json.loads(said)
    except Exception as error:  # damaged files fail in many ways, most of them inside safetensors
        raise InputError(f"{file} is not a {SUFFIX} file that can be read: {reason(error)}") from None
    if not isinstance(about, dict):
        raise InputError(f"{file} does not say what its weights are of: {shown(said)}")
    small = (torch.float16, torch.bfloat16)
    return {name: t.float() if t.dtype in small else t for name, t in tensors.items()}, about


def card(path: str | Path) -> dict[str, Any]:
    """What a file of weights says of its network: name, shape, classes, data, threat, problem, results, versions.

    Args:
        path: the file, or the name of a network in the package.
    """
    return read_shared(path)[1]


def load_shared(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The network of a file of weights, in eval mode.

    Args:
        path: the file, or the name of a network in the package.
        model: the network to load the weights into; needed only where a problem file of the user's own defined it.

    Raises:
        InputError: if the file is missing or damaged, or describes no network, or another one.
    """
    state, about = read_shared(path)
    if model is None:
        name, shape, classes = described(path, about)
        if name == "file":
            raise InputError(f"{path} is of a model that a problem file defined; pass one as load(..., model=...)")
        activation: Any = str(about.get("activation", "relu"))
        try:
            with torch.device("meta"):  # a file may say any shape: nothing is reserved before it is that of its tensors
                expected = build_model(name, shape, classes, activation=activation).state_dict()
        except Exception as error:
            raise InputError(f"{path} describes no network: {reason(error)}") from None
        wrong = [k for k in {*expected, *state} if k not in state or _shape(expected.get(k)) != _shape(state[k])]
        if wrong:
            raise InputError(f"{path} does not have the weights of the model {name}: {shown(min(wrong))} differs")
        with torch.random.fork_rng(devices=[]):  # weights are drawn
            model = build_model(name, shape, classes, activation=activation)
    try:
        model.load_state_dict(state)
    except Exception as error:
        raise InputError(f"{path} does not fit the network: {reason(error)}") from None
    return model.eval()


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)
