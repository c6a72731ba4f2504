"""Images and labels: what is known by name, the user's own ``.npz``, and batches on the training device."""

from __future__ import annotations

from .loader import Augment, Loader
from .named import DATA_NAMES, NotThere, load_data, stand_in
from .npz import extra_from_npz
from .sets import Images, ImageSet
from .stream import Streamed

__all__ = [
    "DATA_NAMES",
    "Augment",
    "ImageSet",
    "Images",
    "Loader",
    "NotThere",
    "Streamed",
    "extra_from_npz",
    "load_data",
    "stand_in",
]
