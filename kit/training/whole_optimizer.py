"""An adapter's optimizer state under ZeRO, whole: saved parameter by parameter, set on any number of processes.

DeepSpeed's own files are cut by process. Under ZeRO-3 its universal checkpoint gives all parameter groups the settings
of the first (load_hp_checkpoint_state_from_checkpoint_dir_stage3): weight decay and LoRA+ would be lost. Its functions
safe_get_full_* and safe_set_full_* work on a parameter, whatever the stage and wherever its state is.

Every function here is collective.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kit.errors import FAILED, KitError
from kit.models.initial_adapter import set_parameter
from kit.storage.checkpoints import LAYOUT

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
WEIGHT = "fp32"  # beside the optimizer's own names: the parameter in the precision that the optimizer keeps


def save_whole_optimizer(model: Any, engine: Any, file: Path, layout: str, writer: bool) -> str:
    """Write each trainable parameter's weight and optimizer state, and all that goes with them, where `writer`.

    Returns why nothing is written, empty where it is: every rank comes to the same.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from safetensors.torch import save_file

    _link_in_order(engine.optimizer)
    parts = flat_parts(engine.optimizer)
    states = [engine.optimizer.optimizer.state.get(part, {}) for part in parts]
    if not parts or not all(states) and any(states):
        return f"{type(engine.optimizer).__name__} does not keep its state in parts of the weights"
    names, single = _by_element(parts[0], states[0]), _single_values(states[0])
    if len(names) + len(single) != len(states[0]) or any(_single_values(state) != single for state in states):
        return f"{type(engine.optimizer.optimizer).__name__} does not keep its state by the elements of the weights"
    tensors: dict[str, Tensor] = {}
    for name, parameter in _trainable(model):
        values = {WEIGHT: safe_get_full_fp32_param(parameter)}
        values.update({key: safe_get_full_optimizer_state(parameter, key) for key in names})
        if any(value is None for value in values.values()):
            return f"DeepSpeed has no optimizer state of {name}"
        weight, held = values[WEIGHT], parameter.detach()
        if not hasattr(parameter, "ds_id") and not torch.equal(weight.to(held.dtype), held):
            return f"DeepSpeed gives another parameter's weight for {name}"  # all ranks hold it and see the same
        if writer:
            tensors.update({f"{key}/{name}": value.detach().to("cpu", copy=True) for key, value in values.items()})
    if writer:
        scheduler = engine.lr_scheduler  # DeepSpeed's own; the trainer saves one of transformers
        rest = {
            "states": {key: str(states[0][key].dtype).removeprefix("torch.") for key in names},
            "single": single,
            "groups": [_plain(group) for group in engine.optimizer.optimizer.param_groups],
            "scaler": _plain(vars(engine.optimizer.loss_scaler)) if hasattr(engine.optimizer, "loss_scaler") else {},
            "scheduler": _plain(scheduler.state_dict()) if scheduler is not None else None,
            "counters": {key: getattr(engine, key) for key in COUNTERS},
        }
        save_file(tensors, file, metadata={LAYOUT: layout, "rest": json.dumps(rest)})
    return ""


def load_whole_optimizer(model: Any, engine: Any, file: Path) -> None:
    """Set a fresh engine's trainable parameters and its optimizer as `save_whole_optimizer` found them.

    KitError where the file is of another adapter; then nothing has been changed.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
    from safetensors import safe_open

    zero, base = engine.optimizer, engine.optimizer.optimizer
    with safe_open(file, framework="pt") as saved:
        rest = json.loads(saved.metadata()["rest"])
        keys = [WEIGHT, *rest["states"]]
        parameters = _trainable(model)
        expected = {f"{key}/{name}" for name, _ in parameters for key in keys}
        if expected != set(saved.keys()) or len(rest["groups"]) != len(base.param_groups):
            raise KitError(
                f"{file} is not of the parameters that this run trains",
                where=str(file),
                fix="start a new run from the adapter beside it",
                code=FAILED,
            )
        for group, values in zip(base.param_groups, rest["groups"], strict=True):
            # Another layout can have another optimizer, which has settings of its own.
            known = {k: v for k, v in values.items() if k in group or k in ("step", "initial_lr")}
            group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in known.items()})
        _make_states(zero, rest)
        _link_in_order(zero)
        if hasattr(zero, "checkpoint_event_prologue"):  # as DeepSpeed's load_checkpoint: parameters cut, then whole
            zero.checkpoint_event_prologue()
        for name, parameter in parameters:
            weight = saved.get_tensor(f"{WEIGHT}/{name}")
            set_parameter(parameter, weight)
            safe_set_full_fp32_param(parameter, weight)
            for key in rest["states"]:
                safe_set_full_optimizer_state(parameter, saved.get_tensor(f"{key}/{name}"), key)
        if hasattr(zero, "checkpoint_event_epilogue"):
            zero.checkpoint_event_epilogue()
    for key, value in rest["scaler"].items():
        setattr(zero.loss_scaler, key, value)
    for key, value in rest["counters"].items():
        setattr(engine, key, value)
    if rest["scheduler"] is not None and engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(rest["scheduler"])


def _trainable(model: Any) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def flat_parts(zero: Any) -> list[Tensor]:
    """This process's parts of the weights, in the order of the optimizer's groups: what its state is kept under.

    By ZeRO-3, by ZeRO-1 and 2, and by the optimizer that DeepSpeed takes for ZeRO-1 in bf16 with float32 gradients.
    """
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if parts := getattr(zero, attribute, None):
            return list(parts)
    return []


def _by_element(part: Tensor, state: dict[str, Any]) -> list[str]:
    """The names of what an optimizer keeps for each element of a part."""
    return [k for k, v in state.items() if isinstance(v, Tensor) and v.shape == part.shape and v.is_floating_point()]


def _single_values(state: dict[str, Any]) -> dict[str, float]:
    """What an optimizer keeps once for a part: the number of its steps."""
    return {
        key: value.item() if isinstance(value, Tensor) else value
        for key, value in state.items()
        if not isinstance(value, Tensor) or value.ndim == 0
    }


def _make_states(zero: Any, rest: dict[str, Any]) -> None:
    """Give the optimizer the state that it would have made at its first step, and the number of its steps."""
    if not rest["single"] and not rest["states"]:
        return  # saved before the first step
    base = zero.optimizer
    on_device = any(group.get("fused") or group.get("capturable") for group in base.param_groups)
    in_tensors = type(base).__module__.startswith("torch.")  # DeepSpeed's own count steps in plain numbers
    for part in flat_parts(zero):
        state: dict[str, Any] = {}
        for key, value in rest["single"].items():
            device = part.device if on_device else "cpu"
            state[key] = torch.tensor(float(value), device=device) if in_tensors else int(value)
        for key, dtype in rest["states"].items():
            state[key] = torch.zeros_like(part, dtype=getattr(torch, dtype), requires_grad=False)
        base.state[part] = state


def _link_in_order(zero: Any) -> None:
    """Link the parameters of ZeRO-1 and 2 to their parts of the optimizer's state, which safe_*_full_* go by.

    DeepSpeed 0.19.8 does so after a first step of the first group, when the others have no state yet
    (_lazy_init_hp_params_optimizer_state in runtime/zero/stage_1_and_2.py); and under round_robin_gradients it lays
    parameters out in one order and links them in another, so that they would be given the values of others.
    """
    if not hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        return
    if getattr(zero, "round_robin_gradients", False):
        given, zero.bit16_groups = zero.bit16_groups, zero.round_robin_bit16_groups
        zero._link_all_hp_params()
        zero.bit16_groups = given
    if any(zero.optimizer.state.values()):  # fp16's loss scaler may have skipped all steps so far
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that JSON can hold: numbers, words, lists of them; not the parameters and not tensors."""
    kinds = (bool, int, float, str, type(None))
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
        if key != "params" and (isinstance(value, kinds) or isinstance(value, list | tuple) and _all_plain(value))
    }


def _all_plain(values: Any) -> bool:
    return all(isinstance(value, bool | int | float | str | None) for value in values)
