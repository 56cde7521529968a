"""Counts what ZeRO-3's hooks do in an optimizer step: a figure that is the same on every machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, iter_params
from deepspeed.utils import z3_leaf_module
from transformers import TrainerCallback

GATHER = "_PartitionedParameterCoordinator__all_gather_params_"


class FetchCounter(TrainerCallback):
    """Modules fetched, those whose parameters nobody had asked for before (`late`), all-gathers started and parameters
    in them, of the last step; rank 0 writes `file` at the end.

    `file`: where to write; None: fetches.json beside the checkpoints.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.counts = {"fetches": 0, "late": 0, "gathers": 0, "parameters": 0}
        self.last = dict(self.counts)
        self.upstream = {name: getattr(PartitionedParameterCoordinator, name) for name in ("fetch_sub_module", GATHER)}

        def fetch(coordinator: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
            self.counts["fetches"] += 1
            needed = iter_params(module, recurse=z3_leaf_module(module))
            self.counts["late"] += any(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in needed)
            return self.upstream["fetch_sub_module"](coordinator, module, *args, **kwargs)

        def gather(coordinator: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            absent = sum(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in params)
            self.counts["gathers"] += bool(absent)
            self.counts["parameters"] += absent
            return self.upstream[GATHER](coordinator, params, *args, **kwargs)

        PartitionedParameterCoordinator.fetch_sub_module = fetch
        setattr(PartitionedParameterCoordinator, GATHER, gather)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = dict(self.counts)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = {name: count - self.before[name] for name, count in self.counts.items()}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, method in self.upstream.items():
            setattr(PartitionedParameterCoordinator, name, method)
        if os.environ.get("RANK", "0") == "0":
            file = self.file or Path(args.output_dir).parent / "fetches.json"
            file.write_text(json.dumps(self.last) + "\n")
