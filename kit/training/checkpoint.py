"""What a save holds: the tensors that training changed, gathered one by one, and the proof that the file has them all.

Functions named "collective" must run on every rank. No function here copies or clones a frozen base.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kit.errors import FAILED, KitError
from kit.inspection.adapter import WEIGHTS
from kit.models.adapters import must_save_embeddings
from kit.models.tensors import full_shape, is_finite, named_tensors
from kit.storage import manifest
from kit.storage.checkpoints import WHOLE_OPTIMIZER
from kit.storage.safetensors_header import TensorEntry as StoredTensor
from kit.storage.safetensors_header import read_header, read_tensors

Shapes = dict[str, tuple[int, ...]]
CHUNK = 64 * 1024**2  # elements gathered at once under ZeRO-3; 128 MB in bf16


# ---- ranks ----


def gather_objects(value: Any, group: Any) -> list[Any]:
    """Every rank's `value`, by rank. Collective; also a barrier. `group` None means one process."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def raise_on_all_ranks(error: KitError | None, group: Any) -> None:
    """Wait for all ranks and fail on all of them when it failed on one. Collective.

    Without it the others would wait in their next collective until its timeout.
    """
    for rank, message in enumerate(gather_objects(str(error) if error else None, group)):
        if error:
            raise error
        if message:
            raise KitError(
                f"rank {rank} failed: {message}", fix=f"see logs/rank{rank}.log; kit doctor RUN", code=FAILED
            )


def hash_on_all_ranks(folder: Path, group: Any, writer: bool, each_node: bool = False) -> dict[str, dict]:
    """Size, SHA-256 and flush of every file in `folder`, the files shared out over the ranks by size. Collective.

    each_node: every node has its own disk, so its writer does all of it.
    """
    names = manifest.list_folder_files(folder) if writer else []
    if group is None or each_node:
        return manifest.hash_files(folder, names, sync=True)
    sizes = {name: (folder / name).stat().st_size for name in names}
    listing = gather_objects(sizes, group)[0]
    load = [0] * dist.get_world_size(group)
    share: list[list[str]] = [[] for _ in load]
    for name in sorted(listing, key=lambda n: (-listing[n], n)):
        rank = load.index(min(load))
        load[rank] += listing[name] + 1
        share[rank].append(name)
    try:
        hashes: Any = manifest.hash_files(folder, share[dist.get_rank(group)], sync=True)
    except OSError as error:
        hashes = f"{error}"
    merged: dict[str, dict] = {}
    for rank, part in enumerate(gather_objects(hashes, group)):
        if isinstance(part, str):
            problem = f"rank {rank} cannot read back what was saved: {part}"
            raise KitError(problem, str(folder), "runs_dir on a disk that every node sees; df -h", code=FAILED)
        merged.update(part)
    return merged


# ---- tensors ----


def gather_tensors(tensors: dict[str, Tensor], keep: bool, copy: bool = True) -> dict[str, Tensor]:
    """The whole tensors on the CPU where `keep`, else an empty dict. Collective under ZeRO-3.

    Names of one tensor share one copy. copy: False leaves an unsharded tensor with memory of its own where it is.
    KitError (4) where a value is not finite.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    unique = {key: tensors[group[0]] for key, group in names.items()}
    result: dict[str, Tensor] = {}
    broken: list[str] = []

    def take(tensor: Tensor) -> None:
        value = tensor.detach()
        if not is_finite(value):
            broken.append(names[id(tensor)][0])
        # A view into a larger buffer (ZeRO-1/2 flatten the parameters) would drag all of it into the file.
        own_memory = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        if copy or not own_memory or hasattr(tensor, "ds_id"):
            value = value.to("cpu", copy=True)
        result.update(dict.fromkeys(names[id(tensor)], value))

    sharded = [t for t in unique.values() if hasattr(t, "ds_id")]
    for chunk in _chunks(sharded):
        import deepspeed

        with deepspeed.zero.GatheredParameters(chunk):
            for tensor in chunk if keep else ():
                take(tensor)
    for tensor in unique.values() if keep else ():
        if not hasattr(tensor, "ds_id"):
            take(tensor)
    if broken:
        raise KitError(
            f"{len(broken)} tensors hold NaN or infinity, so nothing is saved; the first is {broken[0]}",
            fix="resume from the last checkpoint with a lower learning rate, or look at the data of these steps",
            code=FAILED,
        )
    return {name: result[name] for name in tensors} if keep else {}


def _chunks(parameters: list[Any]) -> Iterable[list[Any]]:
    chunk: list[Any] = []
    size = 0
    for parameter in parameters:
        if chunk and size + parameter.ds_numel > CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(parameter)
        size += parameter.ds_numel
    if chunk:
        yield chunk


@contextlib.contextmanager
def keep_trainable_dtypes(model: nn.Module) -> Iterator[None]:
    """Trainable parameters keep their dtype while the block loads an adapter into them.

    PEFT makes a loaded adapter float32; that of a quantized base trains in bfloat16 (peft#2889), and would change.
    """
    before = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in before and parameter.dtype != before[name]:
            parameter.data = parameter.data.to(before[name])


def trainable_state_dict(model: Any, writer: bool = True) -> tuple[dict[str, Tensor], dict[str, Shapes], bool]:
    """What PEFT needs to save its adapters. Collective.

    Returns (CPU tensors by the model's own names, empty where not `writer`; {adapter: {key in the file: shape}};
    whether embeddings are included). KitError (4) where a value is not finite.

    PEFT itself chooses what belongs to an adapter. For LoRA it is given empty stand-ins in place of the tensors, so
    the choice costs no memory and no communication; methods that compute what they save get the tensors themselves.
    """
    from peft import get_peft_model_state_dict

    tensors = named_tensors(model)
    selects = all(config.peft_type == "LORA" for config in model.peft_config.values())
    seen = {name: torch.empty(0, device="meta") for name in tensors} if selects else tensors
    origin = {id(tensor): name for name, tensor in seen.items()}
    embeddings = any(must_save_embeddings(model, adapter) for adapter in model.peft_config)
    expected: dict[str, Shapes] = {}
    wanted = {} if selects else {name: t for name, t in tensors.items() if t.requires_grad}
    for adapter in model.peft_config:
        chosen = get_peft_model_state_dict(
            model, state_dict=seen, adapter_name=adapter, save_embedding_layers=embeddings
        )
        names = {key: origin.get(id(tensor)) for key, tensor in chosen.items()}
        wanted.update({name: tensors[name] for name in names.values() if name})
        expected[adapter] = {
            key: full_shape(tensors[name]) if (name := names[key]) else tuple(tensor.shape)
            for key, tensor in chosen.items()
        }
    return gather_tensors(wanted, keep=writer), expected, embeddings


def full_state_dict(model: nn.Module, writer: bool = True) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of a fully tuned model; tied names share one tensor. Collective.

    Only the writer holds copies, and of an unsharded model it holds none.
    """
    sharded = any(hasattr(p, "ds_id") for p in model.parameters())
    tensors = named_tensors(model) if sharded else model.state_dict(keep_vars=True)
    return gather_tensors({k: v for k, v in tensors.items() if isinstance(v, Tensor)}, keep=writer, copy=False)


# ---- proof ----


def check_saved_adapter(saved: str | Path | dict[str, Tensor], expected: Shapes, trained: bool = False) -> list[str]:
    """Read a written adapter back and compare it with what it must hold; returns remarks, one sentence each.

    saved: the file, its folder, or tensors. expected: {key: shape}. trained: steps were made, so B should have moved.
    KitError (4) where a tensor is missing, surplus, empty, of another shape, not finite, or LoRA's and not 2-D.
    """
    from safetensors.torch import load_file

    where = "" if isinstance(saved, dict) else str(saved)
    if not isinstance(saved, dict):
        path = Path(saved)
        path = path / WEIGHTS if path.is_dir() else path
        try:
            saved = load_file(path)
        except Exception as error:  # safetensors raises its own type for damage and OSError for absence
            fix = "the disk returned other bytes than were written: df -h, dmesg; kit resume RUN from an earlier save"
            raise KitError(f"{path} cannot be read back: {error}", where, fix, code=FAILED) from error
    problems = [f"{key} is missing" for key in expected.keys() - saved.keys()]
    problems += [f"{key} should not be there" for key in saved.keys() - expected.keys()]
    if not expected:
        problems.append("the adapter has no tensors")
    for key in sorted(expected.keys() & saved.keys()):
        tensor, shape = saved[key], tuple(expected[key])
        lora = ".lora_A" in key or ".lora_B" in key or ".lora_embedding_" in key
        if tensor.numel() == 0:
            problems.append(f"{key} is empty")
        elif tuple(tensor.shape) != shape:
            problems.append(f"{key} has shape {tuple(tensor.shape)}, the model's is {shape}")
        elif lora and tensor.ndim < 2 and not key.endswith(".bias"):
            problems.append(f"{key} has {tensor.ndim} dimension(s), a LoRA matrix has 2")
        elif not is_finite(tensor):
            problems.append(f"{key} holds NaN or infinity")
    if problems:
        listed = "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise KitError(
            f"the adapter is not complete: {listed}",
            where=where,
            fix="nothing was published; resume from the last checkpoint and report the configuration",
            code=FAILED,
        )
    moved = [key for key in saved if ".lora_B" in key or ".lora_embedding_B" in key]
    if trained and moved and not any(bool(saved[key].any()) for key in moved):
        return ["every LoRA B matrix is zero after training: the adapter changes nothing"]
    return []


def check_saved_model(folder: Path, state_dict: dict[str, Tensor], ignored: Iterable[str] = ()) -> list[StoredTensor]:
    """Compare a written full model with the tensors it was made from: none empty, as many numbers in all.

    Names are not compared, because transformers may write a model under the names of its original format.
    """
    stored = list(read_tensors(folder).values())
    unique = {t.data_ptr(): t for k, t in state_dict.items() if k not in set(ignored)}
    expected = sum(t.numel() for t in unique.values())
    written = sum(math.prod(t.shape) for t in stored)
    if not stored or written != expected or any(0 in t.shape for t in stored):
        raise KitError(
            f"the saved model is not complete: its files hold {written} numbers, the model {expected}",
            where=str(folder),
            fix="nothing was published; resume from the last checkpoint and report the configuration",
            code=FAILED,
        )
    return stored


def saved_tensor_headers(folder: Path) -> list[StoredTensor]:
    """The headers of every adapter or model file in a save, for the manifest's counts."""
    files = sorted(f for f in folder.rglob("*.safetensors") if f.name != WHOLE_OPTIMIZER)
    return [tensor for file in files for tensor in read_header(file)]
