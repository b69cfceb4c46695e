"""WeakMedSAM: medical image segmentation from image-level labels (Wang et al., IEEE TMI 2025)."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """``load_run``, imported when it is asked for, by name: commands that only look load no torch."""
    if name == "load_run":
        return importlib.import_module("weakmedsam.inference.trained_run").load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
