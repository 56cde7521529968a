"""Embeddings at both ends of a model: kept tied or untied, grown to a new vocabulary, and config.json told so."""

from __future__ import annotations

from kit.errors import KitError
from kit.inspection.architectures import EMBEDDING_NAMES
from kit.merging.adapter import read_tensor_bytes
from kit.merging.parts import MergePlan, TensorEdit
from kit.storage.safetensors_header import TensorEntry


def _same_bytes(a: TensorEntry, b: TensorEntry) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return read_tensor_bytes(a) == read_tensor_bytes(b)


def resolve_tied_weights(plan: MergePlan, edits: dict[str, TensorEdit]) -> None:
    """Keep tied matrices tied where both ends stay equal, else write both and untie them in config.json.

    As trained: LoRA or modules_to_save on one end leave the other end as it was; token rows and a changed base layer
    are seen by both (peft/utils/other.py, set_additional_trainable_modules).
    """
    for other, main in plan.names.tied.items():
        left, right = edits.get(main), edits.get(other)
        either = left or right
        if either is None:
            continue
        if plan.adapter.config.get("ensure_weight_tying"):
            edits[main] = either
            edits.pop(other, None)
            continue
        left, right = left or TensorEdit(), right or TensorEdit()
        shared = left.replace if main in plan.adapter.shared else None
        shared = shared or (right.replace if other in plan.adapter.shared else None)
        left.replace, right.replace = left.replace or shared, right.replace or shared
        right.rows = right.rows or (None if right.lora or other in plan.adapter.full else left.rows)
        equal_start = left.replace is right.replace or (
            left.replace is not None and right.replace is not None and _same_bytes(left.replace, right.replace)
        )
        if equal_start and not left.lora and not right.lora and left.rows == right.rows:
            edits[main] = left
            edits.pop(other, None)
            continue
        edits[main], edits[other] = left, right
        set_config_value(plan, "tie_word_embeddings", False)
        plan.notes.append(f"{other} and {main} were tied and differ now: both are written, tie_word_embeddings=false")


def set_config_value(plan: MergePlan, key: str, value: object) -> None:
    configs = [plan.config, *(v for v in plan.config.values() if isinstance(v, dict) and key in v)]
    for config in configs:
        if config is plan.config or key in config:
            config[key] = value
    plan.changes.append(key)


def check_resized_vocabulary(plan: MergePlan) -> None:
    """Where embeddings were resized: the ends agree, and config.json says so."""
    outputs = {o.name: o for outputs in plan.shards.values() for o in outputs}
    resized = {n: o for n, o in outputs.items() if n in plan.tensors and o.shape != plan.tensors[n].shape}
    if not resized:
        return
    rows = {o.shape[0] for o in resized.values()}
    old = {plan.tensors[n].shape[0] for n in resized}
    behind = [n for n, o in outputs.items() if len(o.shape) == 2 and o.shape[0] in old and _is_vocabulary(plan, n)]
    if len(rows) > 1 or behind:
        raise KitError(
            f"the vocabulary was resized to {sorted(rows)} rows, but not everywhere: {', '.join(behind)}",
            where=str(plan.adapter.folder),
            fix="save the adapter with save_embedding_layers=true",
        )
    plan.vocabulary = rows.pop()
    set_config_value(plan, "vocab_size", plan.vocabulary)


def _is_vocabulary(plan: MergePlan, name: str) -> bool:
    module = {v: k for k, v in plan.names.stored.items()}.get(name, name).rpartition(".")[0]
    return module.split(".")[-1] in EMBEDDING_NAMES
