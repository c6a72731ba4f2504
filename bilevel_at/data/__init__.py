"""Images and labels: what is known by name, the user's own ``.npz``, and batches on the training device."""

from __future__ import annotations

from .loader import Loader
from .sets import DATA_NAMES, Images, load_data

__all__ = ["DATA_NAMES", "Images", "Loader", "load_data"]
