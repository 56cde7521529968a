"""Packages that the libraries import wherever they are installed, kept out of a rank that has no use for them.

TRL imports wandb and DeepSpeed, DeepSpeed mlflow, and PEFT bitsandbytes, which brings torch's compiler: together a
quarter of the seconds between a rank's start and its first line.
"""

from __future__ import annotations

import sys

from kit.errors import KitError
from kit.schema.run_plan import RunPlan
from kit.schema.trackers import tracker_names
from kit.storage.safetensors_header import find_model_folder, read_model_config

TORCH_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor")


def skip_unused_packages(*plans: RunPlan) -> None:
    """Make the packages that none of the plans needs look absent in this process, before anything imports them.

    For a process that runs these plans and no code of the user's: `import wandb` fails in it from here on.
    """
    for name in set.intersection(*({*unused_packages(plan)} for plan in plans)):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # importlib's own mark of a module that is not there


def unused_packages(plan: RunPlan) -> list[str]:
    """Those of wandb, mlflow, DeepSpeed and bitsandbytes that no setting of the plan asks for."""
    if plan.model.trust_remote_code:  # who knows what it imports
        return []
    monitored = [*tracker_names(plan.trainer.get("report_to")), *(plan.deepspeed or {})]  # DeepSpeed has monitors too
    unused = [name for name in ("wandb", "mlflow") if name not in monitored] + ["deepspeed"] * (not plan.deepspeed)
    plain = str(plan.trainer.get("optim")) in TORCH_OPTIMIZERS and "loftq" not in str(plan.peft)
    return [*unused, "bitsandbytes"] if plain and not plan.quantization and not stored_quantized(plan) else unused


def stored_quantized(plan: RunPlan) -> bool:
    """Whether the base's config.json says that its weights are quantized; True where there is none to read."""
    folder = find_model_folder(plan.model.name_or_path, plan.model.revision)
    try:
        return folder is None or "quantization_config" in str(read_model_config(folder))
    except KitError:
        return True
