"""Which activations a trainer section recomputes, by transformers' two names: activation_* goes before gradient_*."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_checkpointed(trainer: Mapping[str, Any]) -> bool:
    """Tell whether activations are recomputed; of the old name TRL makes the default true."""
    new, old = trainer.get("activation_checkpointing"), trainer.get("gradient_checkpointing", True)
    return bool(old if new is None else new)


def checkpointing_kwargs(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return `activation_checkpointing_kwargs`, as given, whether or not anything is recomputed."""
    given = trainer.get("activation_checkpointing_kwargs") or trainer.get("gradient_checkpointing_kwargs")
    return dict(given) if isinstance(given, dict) else {}
