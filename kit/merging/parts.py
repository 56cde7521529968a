"""The parts of a merge plan: what becomes of each stored tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.merging.adapter import SortedAdapter
from kit.merging.dequantize import BaseQuantization
from kit.merging.names import TensorNames
from kit.storage.safetensors_header import TensorEntry


@dataclass
class LoraUpdate:
    """One low-rank change. In the stored layout it is scale * B @ A, transposed for Conv1D and embeddings."""

    a: TensorEntry
    b: TensorEntry
    scale: float
    transposed: bool
    magnitude: TensorEntry | None = None


@dataclass
class TensorEdit:
    """What happens to one stored tensor, in this order."""

    replace: TensorEntry | None = None
    restore: tuple[BaseQuantization, bool] | None = (
        None  # through this quantization; whether it is a Conv1D's, transposed
    )
    lora: LoraUpdate | None = None
    rows: tuple[list[int], TensorEntry] | None = None
    add: tuple[TensorEntry, float] | None = None


@dataclass
class OutputTensor:
    """One tensor of the merged model; `source` is where its values start from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorEntry
    edit: TensorEdit | None = None


@dataclass
class MergePlan:
    """The merge of one adapter into one base."""

    base: Path
    adapter: SortedAdapter
    config: dict[str, Any]  # the base's, changed where it must be
    names: TensorNames
    tensors: dict[str, TensorEntry]
    shards: dict[str, list[OutputTensor]] = field(default_factory=dict)  # file name -> tensors in file order
    indexed: bool = False
    through_peft: str = ""  # why peft must do it
    changes: list[str] = field(default_factory=list)  # what config.json will say otherwise
    notes: list[str] = field(default_factory=list)
    vocabulary: int | None = None  # rows of resized embeddings
    trained_on: BaseQuantization | None = None  # how the run quantized its base
    dequantized: set[str] = field(default_factory=set)  # linear layers that start from what the quantized ones held

    def restores(self, parameter: str) -> tuple[BaseQuantization, bool] | None:
        """The quantization that a parameter goes through, and whether it is stored transposed."""
        module, _, name = parameter.rpartition(".")
        if self.trained_on is None or name != "weight" or module not in self.dequantized:
            return None
        return self.trained_on, self.names.kind(module) == "conv1d"

    @property
    def edited(self) -> list[OutputTensor]:
        return [o for outputs in self.shards.values() for o in outputs if o.edit]
