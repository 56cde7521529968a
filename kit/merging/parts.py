"""The parts of a merge plan: what becomes of each stored tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.merging.adapter import Adapter
from kit.merging.names import Names
from kit.weights import Tensor


@dataclass
class Lora:
    """One low-rank change. In the stored layout it is scale * B @ A, transposed for Conv1D and embeddings."""

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool
    magnitude: Tensor | None = None


@dataclass
class Edit:
    """What happens to one stored tensor, in this order."""

    replace: Tensor | None = None
    lora: Lora | None = None
    rows: tuple[list[int], Tensor] | None = None
    add: tuple[Tensor, float] | None = None


@dataclass
class Output:
    """One tensor of the merged model; `source` is where its values start from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Tensor
    edit: Edit | None = None


@dataclass
class Plan:
    """The merge of one adapter into one base."""

    base: Path
    adapter: Adapter
    config: dict[str, Any]  # the base's, changed where it must be
    names: Names
    tensors: dict[str, Tensor]
    shards: dict[str, list[Output]] = field(default_factory=dict)  # file name -> tensors in file order
    indexed: bool = False
    through_peft: str = ""  # why peft must do it
    changes: list[str] = field(default_factory=list)  # what config.json will say otherwise
    notes: list[str] = field(default_factory=list)
    vocabulary: int | None = None  # rows of resized embeddings

    @property
    def edited(self) -> list[Output]:
        return [o for outputs in self.shards.values() for o in outputs if o.edit]
