"""``evaluate(model, data, attacks=[...])``: accuracies of any network, and warnings about them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import shares
from ..constraints import Constraint
from ..data import Images, ImageSet
from ..division import agree
from ..errors import InputError
from ..modes import attack_mode
from .attacks import Attack, Surrogates, attack_from_name
from .checks import check, compare_traces, findings
from .result import Evaluation, Progress, Score, result_name
from .robust import Trace, attack_examples
from .threat import SEEN, Threat, ball, check_set, norm_of

__all__ = ["EvaluationWarning", "as_images", "attacks_at", "evaluate"]


class EvaluationWarning(UserWarning):
    """A robust accuracy may be unreliable."""


def attacks_at(
    names: str | Iterable[str | Attack],
    spaces: Sequence[Constraint],
    seed: int = 0,
    surrogates: Surrogates | None = None,
) -> list[Attack]:
    """Every attack in every constraint; :class:`Attack` objects and ``clean`` once.

    Args:
        names: names and :class:`Attack` objects; a string of names is split at spaces.
        spaces: the constraints.
        seed: of AutoAttack and its parts.
        surrogates: the networks of ``transfer:NAME``, by name.

    Raises:
        InputError: if there is no attack, a name is unknown, or a named attack has no constraint.
    """
    made: list[Attack] = []
    names = names.split() if isinstance(names, str) else names
    for name in dict.fromkeys(names):
        if isinstance(name, Attack):
            made.append(name)
        elif name == "clean":
            made.append(Attack("clean"))
        elif not spaces:
            raise InputError(f"attack {name!r} needs a radius; pass epsilon=8/255, or a list for a curve")
        else:
            made += [attack_from_name(name, space, seed, surrogates) for space in spaces]
    if not made:
        raise InputError("attacks names no attack; clean, pgd-50-10, beta-30 and autoattack are some")
    return made


def as_images(data: Any, model: nn.Module) -> ImageSet:
    """Convert data to an :class:`ImageSet` on the model's device.

    Args:
        data: an :class:`ImageSet`, ``(x, y)``, or a DataLoader of such pairs.
        model: the network; its output for one image gives the number of classes.

    Raises:
        InputError: if the data are empty or of another type, or the network gives no logits.
    """
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    if isinstance(data, ImageSet):
        if len(data) == 0:
            raise InputError("data is empty; it needs at least one image")
        return data if data.device == device else data.to(device)
    if isinstance(data, DataLoader):
        with torch.random.fork_rng():  # a DataLoader draws a seed even if it does not shuffle
            pairs = [(x, y) for x, y, *_ in data]
        data = tuple(torch.cat(part) for part in zip(*pairs, strict=True))
    if not (isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)):
        raise InputError(f"data is {type(data).__name__}; pass (x, y) tensors, a DataLoader of them, or an ImageSet")
    x, y = (part.detach().to(device) for part in data)
    if len(x) != len(y) or len(x) == 0:
        raise InputError(f"data has {len(x)} inputs and {len(y)} labels; it needs as many of both, at least one")
    if not x.is_floating_point():
        raise InputError(f"x is {x.dtype}; inputs are floating point in [0, 1] (divide uint8 by 255)")
    with torch.no_grad(), attack_mode(model, "eval"):
        out = model(x[:1])
    if not isinstance(out, Tensor) or out.ndim != 2:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise InputError(f"the model's output for one input is {shape}; logits are a tensor of shape [1, classes]")
    return Images(x, y, out.shape[1])


@torch.inference_mode(False)
def evaluate(
    model: nn.Module,
    data: ImageSet | tuple[Tensor, Tensor] | DataLoader[Any],
    attacks: str | Sequence[str | Attack] = ("clean", "pgd-50-10"),
    epsilon: float | Sequence[float] | None = None,
    *,
    norm: str = "linf",
    constraint: Constraint | None = None,
    seed: int = 0,
    batch_size: int = 250,
    checks: int = 100,
    surrogates: Surrogates | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate the accuracy of any network under each attack, and check whether the results can be trusted.

    Several processes (:func:`bilevel_at.shares.together`) share the work and get the same result. Each needs the whole
    data and the same network. Warnings are issued by the first.

    Args:
        model: maps inputs in [0, 1] to logits. It is evaluated in eval mode; its mode is restored.
        data: an :class:`~bilevel_at.data.ImageSet`, ``(x, y)`` with ``x [N, ...]`` and ``y [N]`` int64, or a DataLoader
            of such pairs.
        attacks: names (:data:`ATTACKS`) or :class:`Attack` objects.
        epsilon: the radius of the ``norm`` ball, intersected with [0, 1]; or several radii, whose results are named
            ``pgd-50-10@4/255``.
        norm: "linf" or "l2".
        constraint: any other set, instead of a ball or besides.
        seed: of all random draws.
        batch_size: images in a batch.
        checks: the number of examples for :func:`check`; 0 for no checks. Their warnings are in ``.warnings`` and
            issued as :class:`EvaluationWarning`.
        surrogates: the networks of ``transfer:NAME`` attacks by name, or a function from a name to its network, such as
            ``ba.load`` for paths of runs.
        progress: called with the result's name, the stage, batches done, batches to do, the trace. After each batch; on
            several processes, on each after each round of batches.

    Returns:
        The scores by name, with traces, warnings and measurements.

    Raises:
        InputError: for an unknown attack, and if inputs are not in [0, 1], where ε would have another scale.
    """
    if checks < 0:
        raise InputError(f"checks is {checks}; it must be at least 0")
    spaces: list[Constraint] = [ball(norm, radius) for radius in _radii(epsilon)]
    if constraint is not None:
        spaces.append(constraint)
    made = attacks_at(attacks, spaces, seed, surrogates)
    in_train_mode = any(module.training for module in model.modules())
    images = as_images(data, model)
    fingerprint = images.sha256()[:16]
    if shares.count() > 1:
        agree("the fingerprint of network and images", (_weights_digest(model), fingerprint))
    for space in spaces:
        if norm_of(space) is None:
            check_set(space, images[slice(0, SEEN)].pixels())
    # With several constraints, the name of every result has its own.
    usual = Threat(norm, -1.0) if len(spaces) > 1 else Threat.of(spaces[0]) if spaces else None
    result, by_name = Evaluation(), {}
    for attack in made:
        name = result_name(attack, usual)
        trace = Trace.start(len(images), images.device)
        for trace, stage, done, of in attack_examples(model, images, attack, seed=seed, batch_size=batch_size):
            if progress is not None:
                progress(name, stage, done, of, trace)
        result.traces[name], by_name[name] = trace, attack
        result.scores[name] = Score.of(trace, attack, data=fingerprint, seed=seed, batch_size=batch_size)
    if checks:
        few = images.sample(checks)
        sets = [*spaces, *(a.constraint for a in made if a.constraint is not None)]
        checked = next((one for one in sets if _radius(one) > 0), sets[0] if sets else None)
        result.measured, result.warnings = check(
            model, few, checked, seed=seed, batch_size=batch_size, left_in_train_mode=in_train_mode
        )
        for one in [checked] if len(spaces) < 2 else spaces:
            here = {n: t for n, t in result.traces.items() if one is None or _is_in(by_name[n], one)}
            compared = compare_traces(here, by_name)
            at = result_name(Attack("", one), usual) if one is not None and len(spaces) > 1 else ""
            result.measured |= {f"{key}{at}": value for key, value in compared.items()}
            result.warnings += findings(compared)
        for finding in result.warnings if shares.rank() == 0 else ():
            warnings.warn(str(finding), EvaluationWarning, stacklevel=2)
    return result


def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in (*model.parameters(), *model.buffers()):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _radii(epsilon: Any) -> list[Any]:
    if epsilon is None:
        return []
    if isinstance(epsilon, (str, bool)):
        return [epsilon]  # rejected by the ball
    return list(np.atleast_1d(np.asarray(epsilon, dtype=float)).tolist())


def _is_in(attack: Attack, space: Constraint) -> bool:
    """Whether an attack has that threat, or perturbs nothing."""
    return attack.threat is None or attack.epsilon == 0 or attack.threat.key == Threat.of(space).key


def _radius(space: Constraint) -> float:
    return Attack("", space).epsilon
