"""Which processes a checkpoint can be resumed by: as many as saved it, another number of them, or none but as weights.

DeepSpeed cuts the optimizer's state by the number of processes and puts it together for no other number. Checkpoints
of adapters therefore also hold it whole (`training/whole_optimizer`), under the conditions that stand here.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kit.errors import Problem
from kit.schema.dotted import value_at
from kit.storage.safetensors_header import read_metadata

WHOLE_OPTIMIZER = "optimizer.safetensors"  # the optimizer's state by parameter, for any number of processes
LAYOUT = "layout"  # in its metadata


def why_not_whole(deepspeed: Mapping[str, Any], adapter: bool) -> str:
    """Why no whole optimizer state is saved under this DeepSpeed JSON; empty where it is saved."""
    zero: Mapping[str, Any] = deepspeed.get("zero_optimization") or {}
    offload = value_at(zero, "offload_optimizer") or {}
    devices = {part: (value_at(zero, f"offload_{part}.device") or "none") for part in ("optimizer", "param")}
    if not adapter:
        return "the optimizer's state of a whole model is saved once, cut by process: a second copy would double it"
    if zero.get("stage") not in (1, 2, 3):
        return "DeepSpeed gives a parameter's optimizer state for ZeRO stages 1 to 3 alone"
    if "nvme" in devices.values():
        return "the optimizer's state or the parameters are on NVMe, in files of each process"
    if offload.get("super_offload") or zero.get("zenflow") or (offload.get("ratio") or 1.0) < 1:
        return "with super_offload, zenflow or a ratio below 1 two optimizers hold the state"
    if (zero.get("zero_hpz_partition_size") or 1) > 1 or (zero.get("mics_shard_size") or -1) > 0:
        return "zero_hpz_partition_size and mics_shard_size cut the parameters by groups of processes"
    if (value_at(deepspeed, "tensor_parallel.autotp_size") or 0) > 1:
        return "tensor parallelism cuts the parameters themselves"
    return ""


def why_other_order(trainer: Mapping[str, Any], streaming: bool) -> str:
    """Why another number of processes would see other rows from here on; empty where it would not.

    With transformers' random and sequential order the optimizer's steps are the same rows in any division: process p
    of P takes batch i * P + p (BatchSamplerShard in accelerate).
    """
    strategy = str(trainer.get("train_sampling_strategy") or "random")
    given = trainer.get("accelerator_config")
    loader = given if isinstance(given, Mapping) else {}  # a file's name: the ranks know what it holds
    changed = [f"{key}={str(loader[key]).lower()}" for key in ("split_batches", "dispatch_batches") if loader.get(key)]
    changed += [f"{key}=false" for key in ("even_batches", "use_seedable_sampler") if loader.get(key) is False]
    if streaming:
        return "dataset.streaming shares a stream's files out by process"
    if strategy not in ("random", "sequential"):
        return f"trainer.train_sampling_strategy={strategy} groups rows by the batch of one process"
    if trainer.get("dataloader_drop_last"):
        return "trainer.dataloader_drop_last leaves out an epoch's last rows by the batches of each process"
    if changed:
        return f"trainer.accelerator_config.{changed[0]} divides rows otherwise"
    return ""


def zero_layout(deepspeed: Mapping[str, Any] | None) -> str:
    """What DeepSpeed's own files depend on beside the number of processes, in words; empty without DeepSpeed."""
    if not deepspeed:
        return ""
    zero = deepspeed.get("zero_optimization") or {}
    device = value_at(zero, "offload_optimizer.device") or "none"
    return f"ZeRO-{zero.get('stage') or 0}" + (f" with the optimizer on {device}" if device != "none" else "")


def whole_optimizer_of(checkpoint: Path) -> tuple[Path | None, str]:
    """A checkpoint's whole optimizer state, None where it has none, and the layout under which it was saved."""
    file = checkpoint / WHOLE_OPTIMIZER
    if not file.is_file():
        return None, ""
    return file, read_metadata(file).get(LAYOUT, "")


def refuse_resume(
    checkpoint: Path,
    saved_by: int,
    processes: int,
    *,
    trainer: Mapping[str, Any],
    streaming: bool,
    deepspeed: Mapping[str, Any] | None,
    adapter: bool,
    start_anew: str,
    before: Mapping[str, Any] | None = None,
) -> list[Problem]:
    """Why `processes`, under this DeepSpeed JSON, cannot go on from a checkpoint that `saved_by` processes saved.

    before: the JSON of the run so far, where it is known. start_anew: what begins a new run from the checkpoint's
    weights, the way that is always open.
    """
    file, layout = whole_optimizer_of(checkpoint)
    here, before_here = zero_layout(deepspeed), layout or zero_layout(before)
    other_size, other_layout = saved_by != processes, bool(here and before_here and here != before_here)
    if not other_size and not other_layout:
        return []
    reasons = [why_other_order(trainer, streaming)] if other_size else []
    if deepspeed:
        absent = f"it has no {WHOLE_OPTIMIZER}: an older release saved it, or its log says why not"
        reasons.append(why_not_whole(deepspeed, adapter) or ("" if file else absent))
    if other_size:
        what = f"{checkpoint.name} was saved by {count(saved_by)} and cannot go on with {processes}"
        where, fix = "launch.num_gpus", f"launch.num_gpus={saved_by}"
    else:
        what = f"{checkpoint.name} was saved under {before_here} and cannot go on under {here}"
        where, fix = "deepspeed.zero_optimization", f"resume under {before_here}"
    fix += f", or a new run from its weights: {start_anew}"
    return [Problem(f"{what}: {reason}", where, fix) for reason in reasons if reason]


def count(processes: int) -> str:
    return f"{processes} process{'es' * (processes != 1)}"


def weights_override(checkpoint: Path | str, adapter: bool) -> str:
    """What begins a new run with a checkpoint's weights."""
    return f"{'peft.init_from' if adapter else 'model.name_or_path'}={checkpoint}"


def start_from_weights(
    checkpoint: Path, begun: Sequence[str], resumed: Sequence[str], global_batch_size: int, adapter: bool
) -> str:
    """The command for a new run from a checkpoint's weights: as begun and resumed, with the same global batch."""
    weights = weights_override(checkpoint, adapter)
    overrides = [o.lstrip("+") for o in begun]
    overrides += [
        o for o in resumed if o.startswith("launch.") or o.startswith("trainer.per_device_train_batch_size=")
    ]
    settled = {weights.partition("=")[0], "trainer.gradient_accumulation_steps", "global_batch_size"}
    kept = {o.partition("=")[0]: o for o in overrides if o.partition("=")[0] not in settled}  # the last of each
    return shlex.join(["kit", "train", *kept.values(), f"global_batch_size={global_batch_size}", weights])
