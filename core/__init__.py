"""Plexor: an inference engine whose models, number formats and kernels are pip installs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if __name__ != "plexor":
    raise ImportError(
        "this package is imported as 'plexor', not as 'core': run `pip install -e .` and use `import plexor`"
    )

from plexor.extension.markers import hookimpl

if TYPE_CHECKING:
    from plexor.config import EngineConfig
    from plexor.runtime.engine import Completion, Engine
    from plexor.runtime.request import SamplingParams

__version__ = "0.1.0"
__all__ = ["Completion", "Engine", "EngineConfig", "SamplingParams", "__version__", "hookimpl"]

# Resolved on first use, so that `import plexor` (and listing plugins) does not import torch.
_LAZY = {
    "Completion": "plexor.runtime.engine",
    "Engine": "plexor.runtime.engine",
    "EngineConfig": "plexor.config",
    "SamplingParams": "plexor.runtime.request",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'plexor' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
