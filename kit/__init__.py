"""Fine-tuning runs described once: checked in a second, run anywhere, adapters proven complete, merges equal."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["KitError", "ModifiedTrainer", "check", "compose", "merge", "resume", "train"]

# Lazy: `import kit` costs nothing, and only what is used pulls in torch or Hydra.
_WHERE = {
    "KitError": "kit.errors",
    "ModifiedTrainer": "kit.training.trainer",
    "check": "kit.api",
    "compose": "kit.api",
    "merge": "kit.merging",
    "resume": "kit.api",
    "train": "kit.api",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'kit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)
