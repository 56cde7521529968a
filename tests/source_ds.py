"""DeepSpeed JSON as people pass it on: three stages from a catalogue of techniques, and one with literals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCALING = {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1}
ADAMW = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
CPU = {"device": "cpu", "pin_memory": True}

FILES: dict[str, dict[str, Any]] = {
    "catalogue_zero1": {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": 1, "cpu_offload": False},
        "fp16": {"enabled": "auto"},
        "steps_per_print": 1000,
    },
    "catalogue_zero2": {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": 2},
        "fp16": {"enabled": "auto"} | SCALING,
        "steps_per_print": 1000,
        "optimizer": ADAMW,
    },
    "catalogue_zero3": {
        "fp16": {"enabled": "auto"} | SCALING,
        "bf16": {"enabled": "auto"},
        "optimizer": ADAMW,
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": CPU,
            "offload_param": CPU,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    },
    "doctor_zero2": {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 10e-4, "betas": [0.9, 0.999], "eps": 1e-8}},
        "zero_optimization": {"stage": 2},
    },
}


def write_all(folder: Path) -> dict[str, Path]:
    """Each as a file, indented as people write them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.json" for name in FILES}
    for name, path in paths.items():
        path.write_text(json.dumps(FILES[name], indent=2) + "\n", encoding="utf-8")
    return paths
