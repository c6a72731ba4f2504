"""Images and labels: what is known by name, the user's own ``.npz``, and batches on the training device."""

from __future__ import annotations

from .loader import Augment, Loader
from .named import DATA_NAMES, load_data
from .npz import extra_from_npz
from .sets import Images, ImageSet
from .stream import Streamed

__all__ = ["DATA_NAMES", "Augment", "ImageSet", "Images", "Loader", "Streamed", "extra_from_npz", "load_data"]
