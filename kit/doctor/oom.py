"""Out of GPU memory: where in the run it happened, and the levers that this plan still has, in their order."""

from __future__ import annotations

import re
from typing import Any

# A frame or word of the traceback -> the part of the run. The first that fits counts: a backward pass that recomputes
# activations has forward's frames inside, an evaluation too.
STAGES = (
    ("saving", r"in (save_model|_save_checkpoint|_write_full|_write_adapter|save_checkpoint|full_state_dict)\b"),
    ("evaluation", r"in (evaluation_loop|evaluate|prediction_step)\b"),
    ("the backward pass", r"in backward\b|\.backward\(|torch/autograd/__init__|_engine_run_backward"),
    ("the optimizer step", r"in (_take_model_step|step|_optimizer_step|optimizer_step)\b|optim/\w+\.py"),
    ("the forward pass", r"in (compute_loss|training_step|forward|_call_impl)\b"),
    ("deepspeed.initialize", r"in (_configure_\w*optimizer|deepspeed_init|initialize|_prepare_deepspeed)\b"),
    (
        "loading the model",
        r"in (load_model|from_pretrained|_load_pretrained_model|get_peft_model)\b|partition_parameters",
    ),
)
LEVER_ORDER = {
    "loading the model": ("others", "zero3", "quantize", "offload_param"),
    "deepspeed.initialize": ("zero", "offload", "buckets"),
    "the forward pass": ("batch", "checkpointing", "length", "zero", "fragments", "quantize"),
    "the backward pass": ("batch", "checkpointing", "length", "zero", "fragments", "offload"),
    "the optimizer step": ("zero", "offload", "adam", "batch"),
    "evaluation": ("eval", "length"),
    "saving": ("batch", "zero"),
    "training": ("batch", "checkpointing", "length", "zero", "fragments"),
}
NEXT_ZERO_STAGE = {0: "zero2", 1: "zero2", 2: "zero3", 3: "zero3_offload"}


def failed_stage(trace: str) -> str:
    """The part of the run that a traceback ended in."""
    return next((name for name, pattern in STAGES if re.search(pattern, trace)), "training")


def memory_levers(where: str, plan: dict[str, Any], message: str) -> list[str]:
    """Overrides that lower the peak, the cheapest first. plan: plan.json as a dict, {} where it is missing."""
    trainer, engine = plan.get("trainer") or {}, plan.get("deepspeed") or {}
    zero = int((engine.get("zero_optimization") or {}).get("stage") or 0) if engine else 0
    offloads = (engine.get("zero_optimization") or {}).get("offload_optimizer")
    batch = trainer.get("per_device_train_batch_size") or 0
    length = trainer.get("max_length")
    eval_batch = trainer.get("per_device_eval_batch_size") or 0
    checkpointing = trainer.get("gradient_checkpointing") or trainer.get("activation_checkpointing")
    alone = int(plan.get("world_size") or 1) == 1
    quantized = bool(plan.get("quantization"))
    gigabytes = {key: parse_gib(pattern, message) for key, pattern in MEMORY_FIGURES.items()}
    total = gigabytes["total"] or 0.0
    used = gigabytes["mine"] or total
    no_next_stage = (alone and zero < 2) or (zero == 3 and offloads)
    texts = {
        "others": "other processes hold memory of this GPU: nvidia-smi shows whose they are"
        if total and used < 0.8 * total - (gigabytes["free"] or 0) else "",
        "batch": f"trainer.per_device_train_batch_size={batch // 2} (and twice the accumulation)" if batch > 1 else "",
        "eval": f"trainer.per_device_eval_batch_size={eval_batch // 2}" if eval_batch > 1 else "",
        "checkpointing": "" if checkpointing else "trainer.gradient_checkpointing=true",
        "length": f"trainer.max_length={max(128, int(length) // 2)} if few rows are that long" if length else "",
        "zero": "" if no_next_stage else f"deepspeed={NEXT_ZERO_STAGE[min(zero, 3)]}",
        "zero3": "" if zero == 3 or alone else "deepspeed=zero3 (each rank loads its share)",
        "offload": f"deepspeed={'zero3_offload' if zero == 3 else 'zero2_offload'}" if not offloads else "",
        "offload_param": "deepspeed=zero3_offload" if zero == 3 and not quantized else "",
        "buckets": "smaller deepspeed.zero_optimization.reduce_bucket_size and allgather_bucket_size" if zero else "",
        "quantize": "" if quantized else "quantization=nf4 (QLoRA)",
        "adam": "trainer.optim=adamw_8bit" if not offloads else "",
        "fragments": "export PYTORCH_ALLOC_CONF=expandable_segments:True"
        if (gigabytes["reserved"] or 0) > 0.1 * total > 0 else "",
    }  # fmt: skip
    chosen = [texts[key] for key in LEVER_ORDER[where] if texts[key]]
    return list(dict.fromkeys(chosen)) or ["a GPU with more memory, or more GPUs with deepspeed=zero3"]


MEMORY_FIGURES = {
    "total": r"total capacit?y of ([\d.]+) (MiB|GiB)",
    "free": r"of which ([\d.]+) (MiB|GiB) is free",
    "mine": r"this process has ([\d.]+) (MiB|GiB) memory in use",
    "reserved": r"and ([\d.]+) (MiB|GiB) is reserved by PyTorch but unallocated",
}


def parse_gib(pattern: str, message: str) -> float | None:
    """A figure of torch's message in GiB."""
    match = re.search(pattern, message)
    return float(match[1]) / (1024 if match[2] == "MiB" else 1) if match else None
