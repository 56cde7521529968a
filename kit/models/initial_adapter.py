"""`peft.init_from` on the ranks: another adapter's weights into this one, all of them or none."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kit.errors import KitError, Problem, first_line
from kit.inspection.adapter import (
    PICKLE,
    PREFIX,
    missing_tensors,
    module_or_parameter,
    read_adapter_folder,
    standard_keys,
    unknown_modules,
)
from kit.models.adapters import must_save_embeddings
from kit.models.tensors import full_shape, is_finite, named_tensors
from kit.schema.run_plan import InitFrom
from kit.storage import manifest

INIT_FROM = "peft.init_from"


def load_initial_adapter(model: Any, source: InitFrom) -> None:
    """Copy the tensors of `source` into the PEFT model's adapter, in place, before any engine wraps it. Collective.

    KitError where a tensor is missing, surplus, of another shape or not finite; then nothing has been changed.
    """
    folder = Path(source.path)
    tensors = convert_keys_for_model(model, load_adapter_tensors(folder, source))
    targets = adapter_parameters(model)
    if missing := targets.keys() - tensors.keys():
        raise KitError(_at_key(missing_tensors(folder, missing)))
    modules = {name.removeprefix(PREFIX) for name, _ in model.named_modules()}
    surplus = sorted(tensors.keys() - targets.keys())
    unknown = [name for name in map(module_or_parameter, surplus) if not {name, name.rpartition(".")[0]} & modules]
    if unknown:
        raise KitError(_at_key(unknown_modules(folder, unknown)))
    problems = [f"{key} has no place in this run's adapter" for key in surplus]
    for key in sorted(targets.keys() & tensors.keys()):
        if tuple(tensors[key].shape) != full_shape(targets[key]):
            problems.append(f"{key} has shape {tuple(tensors[key].shape)}, the run's {full_shape(targets[key])}")
        elif not is_finite(tensors[key]):
            problems.append(f"{key} holds NaN or infinity")
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise KitError(
            f"{source.path} does not fit this run: {listed}", INIT_FROM, "give an adapter of the same settings"
        )
    for key, target in targets.items():
        set_parameter(target, tensors[key])


def _at_key(error: KitError) -> list[Problem]:
    return [Problem(problem.problem, INIT_FROM, problem.fix) for problem in error.problems]


def load_adapter_tensors(folder: Path, source: InitFrom) -> dict[str, Tensor]:
    """Load the adapter's tensors by PEFT's own keys; a pickle, which the plan must name, is read weights-only.

    KitError where the file is not the plan's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if source.weights is None or not (folder / source.weights).is_file():
        raise KitError(
            f"{source.path} holds no adapter on this machine", INIT_FROM, "fetch it, then start the run again"
        )
    path = folder / source.weights
    if source.sha256 and manifest.hash_file(path)["sha256"] != source.sha256:
        raise KitError(f"{path} has changed since the run was planned", INIT_FROM, "plan the run again")
    try:
        adapter = read_adapter_folder(folder, accept_pickle=source.weights == PICKLE)
    except KitError as error:
        raise KitError(_at_key(error)) from error
    try:
        if adapter.tensors is not None and path == adapter.weights:
            stored = load_file(path)
            return {key: stored[tensor.name] for key, tensor in adapter.tensors.items()}
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise KitError(
            f"{path} is refused: {first_line(error)}", INIT_FROM, "give an adapter in safetensors"
        ) from error
    if not isinstance(stored, dict) or not all(isinstance(v, Tensor) for v in stored.values()):
        raise KitError(f"{path} holds other things than tensors by name", INIT_FROM, "give an adapter in safetensors")
    return {key: stored[name] for name, key in standard_keys(stored).items()}


def convert_keys_for_model(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert what transformers renames and fuses when it loads a base, e.g. one LoRA per expert of Mixtral."""
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    converted = convert_peft_adapter_state_dict_for_transformers(model, model.peft_config["default"], tensors)
    keys = standard_keys(converted)
    return {key if key.startswith(PREFIX) else PREFIX + key: converted[name] for name, key in keys.items()}


def adapter_parameters(model: Any) -> dict[str, Tensor]:
    """The model's own tensors by the key that each has in an adapter file."""
    from peft import get_peft_model_state_dict

    own = named_tensors(model)
    ids = {id(tensor) for tensor in own.values()}
    chosen = get_peft_model_state_dict(model, state_dict=own, save_embedding_layers=must_save_embeddings(model))
    if made := [key for key, tensor in chosen.items() if id(tensor) not in ids]:
        raise KitError(
            f"{made[0]} is computed when it is saved: this method cannot be continued", INIT_FROM, "leave it out"
        )
    return chosen


def set_parameter(target: Tensor, value: Tensor) -> None:
    """Set a parameter; one that ZeRO-3 sharded is gathered, set on rank 0, sharded again. Collective."""
    with torch.no_grad():
        if not hasattr(target, "ds_id"):
            target.copy_(value)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([target], modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                target.copy_(value)
