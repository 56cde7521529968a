"""What an adapter folder says and which parts of it touch which module, read without peft."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.errors import KitError
from kit.storage.json_files import read_json
from kit.storage.safetensors_header import Tensor, read_header

CONFIG, WEIGHTS, PICKLE, MANIFEST = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "manifest.json",
)
PREFIX = "base_model.model."
PARTS = re.compile(
    r"^(?P<module>.+?)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(\.weight)?$"
)
ROWS = re.compile(r"^(?P<module>.+?)\.(token_adapter\.)?trainable_tokens_delta$")

# Fields of a LoraConfig that do not change what a merge computes, or that this merge computes exactly. Any other field
# that is set, also one of a future peft, hands the merge to peft.
EXACT = set(
    """alpha_pattern auto_mapping base_model_name_or_path bias ensure_weight_tying exclude_modules fan_in_fan_out
    inference_mode init_lora_weights layers_pattern layers_to_transform lora_alpha lora_bias lora_dropout
    modules_to_save peft_type peft_version r rank_pattern revision runtime_config target_modules task_type
    trainable_token_indices use_dora use_rslora eva_config qalora_group_size megatron_core loftq_config
    modules_to_tie target_modules_to_tie""".split()
)
PLAIN_INITS = {True, False, None, "gaussian", "eva", "orthogonal"}  # the others alter the base's weights


@dataclass
class Adapter:
    """An adapter folder: its config, tensors by module and part, full tensors by parameter, manifest."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    lora: dict[str, dict[str, Tensor]]
    full: dict[str, Tensor]  # parameter name -> replacement
    shared: set[str]  # replacements of a base layer itself: a tied partner sees them too
    rows: dict[str, Tensor]  # module -> new rows
    unknown: list[str]
    manifest: dict[str, Any] | None


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder; KitError where a file is missing, damaged, pickled or not as its manifest says."""
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).is_file():
            raise KitError(
                f"{folder / PICKLE} is a pickle, which can run any code when it is read",
                fix=f"load it once with peft where you trust it and save it again: that writes {WEIGHTS}",
            )
        raise KitError(f"{folder} has no {WEIGHTS}", fix="give a run, an adapter folder or a cached Hub id")
    config = read_json(folder / CONFIG)
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    for name, entry in ((manifest or {}).get("files") or {}).items():
        path = folder / name
        if name in (CONFIG, WEIGHTS) and (not path.is_file() or sha256(path) != entry.get("sha256")):
            raise KitError(
                f"{path} is not the file that was saved: its SHA-256 differs from {MANIFEST}",
                fix="copy the adapter again, or merge an earlier checkpoint",
            )
    tensors = {t.name: t for t in read_header(folder / WEIGHTS)}
    for tensor in tensors.values():
        check_size(tensor)
    adapter = Adapter(folder, config, tensors, {}, {}, set(), {}, [], manifest)
    for key, tensor in tensors.items():
        _sort_in(adapter, key, tensor)
    return adapter


def _sort_in(adapter: Adapter, key: str, tensor: Tensor) -> None:
    name = key.removeprefix(PREFIX)
    if match := PARTS.match(name):
        adapter.lora.setdefault(match["module"], {})[match["part"]] = tensor
    elif match := ROWS.match(name):
        adapter.rows[match["module"]] = tensor
    elif key == name or ".lora_" in name or not name.endswith((".weight", ".bias")):
        adapter.unknown.append(key)
    else:
        module, _, parameter = name.rpartition(".")
        own = any(module.endswith(m) for m in adapter.config.get("modules_to_save") or [])
        if module.endswith(".base_layer"):
            module, own = module.removesuffix(".base_layer"), False
        adapter.full[f"{module}.{parameter}"] = tensor
        if not own:
            adapter.shared.add(f"{module}.{parameter}")


def check_size(tensor: Tensor) -> None:
    """KitError where a tensor's bytes are not what its shape and dtype need."""
    bits = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "BOOL": 8}.get(tensor.dtype)
    if bits is None:
        bits = 16 if tensor.dtype in ("F16", "BF16", "I16", "U16") else 8 if "8" in tensor.dtype else 0
    need = math.prod(tensor.shape) * bits // 8
    if bits and need != tensor.end - tensor.start or tensor.end < tensor.start:
        raise KitError(
            f"{tensor.file} is damaged: {tensor.name} is said to be {tensor.dtype} {list(tensor.shape)} "
            f"but has {tensor.end - tensor.start} bytes",
            fix="fetch the file again",
        )


def why_not_streamed(adapter: Adapter) -> str:
    """Why this adapter needs peft to merge it; empty where the streaming merge is exact."""
    config = adapter.config
    if config.get("peft_type") != "LORA":
        return f"peft_type is {config.get('peft_type')}"
    if config.get("init_lora_weights") not in PLAIN_INITS:
        return f"init_lora_weights={config['init_lora_weights']} alters the base's weights"
    if config.get("use_dora") and config.get("lora_bias"):
        return "use_dora with lora_bias scales the bias while training and not when merging"
    other = sorted(key for key, value in config.items() if value and key not in EXACT)
    if other:
        return f"{', '.join(other)} is set"
    return f"it holds {adapter.unknown[0]}" if adapter.unknown else ""


def rank_and_scale(config: dict[str, Any], module: str) -> tuple[int, float]:
    """r and the factor on B @ A for one module, with patterns and rsLoRA as peft applies them."""

    def pick(patterns: dict[str, Any] | None, default: Any) -> Any:
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    rank = pick(config.get("rank_pattern"), config.get("r", 8))
    alpha = pick(config.get("alpha_pattern"), config.get("lora_alpha", 8))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def token_rows(config: dict[str, Any], module: str) -> list[int]:
    """The rows that a module's trainable tokens replace."""
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        return next((list(v) for k, v in indices.items() if module == k or module.endswith("." + k)), [])
    return list(indices or [])


def read_bytes(tensor: Tensor, start: int = 0, end: int | None = None) -> bytearray:
    """Bytes [start, end) of a tensor; KitError where the file ends early."""
    size = (tensor.end - tensor.start if end is None else end) - start
    data = bytearray(size)
    with open(tensor.file, "rb") as file:
        file.seek(tensor.start + start)
        if file.readinto(data) != size:
            raise KitError(f"{tensor.file} ended early", fix="fetch the file again")
    return data
