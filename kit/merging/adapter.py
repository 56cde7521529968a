"""What an adapter folder says and which parts of it touch which module, read without peft."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.errors import KitError
from kit.inspection.adapter import PLAIN_INITS, PREFIX, AdapterFolder, read_adapter_folder
from kit.storage.safetensors_header import TensorEntry

PARTS = re.compile(
    r"^(?P<module>.+?)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(\.weight)?$"
)
ROWS = re.compile(r"^(?P<module>.+?)\.(token_adapter\.)?trainable_tokens_delta$")

# Fields of a LoraConfig that do not change what a merge computes, or that this merge computes exactly. Any other field
# that is set, also one of a future peft, hands the merge to peft.
STREAMED_SETTINGS = set(
    """alpha_pattern auto_mapping base_model_name_or_path bias ensure_weight_tying exclude_modules fan_in_fan_out
    inference_mode init_lora_weights layers_pattern layers_to_transform lora_alpha lora_bias lora_dropout
    modules_to_save peft_type peft_version r rank_pattern revision runtime_config target_modules task_type
    trainable_token_indices use_dora use_rslora eva_config qalora_group_size megatron_core loftq_config
    modules_to_tie target_modules_to_tie""".split()
)


@dataclass
class SortedAdapter:
    """An adapter folder with its tensors by module and part, full tensors by parameter."""

    opened: AdapterFolder
    lora: dict[str, dict[str, TensorEntry]]
    full: dict[str, TensorEntry]  # parameter name -> replacement
    shared: set[str]  # replacements of a base layer itself: a tied partner sees them too
    rows: dict[str, TensorEntry]  # module -> new rows
    unknown: list[str]

    @property
    def folder(self) -> Path:
        return self.opened.folder

    @property
    def config(self) -> dict[str, Any]:
        return self.opened.config

    @property
    def manifest(self) -> dict[str, Any] | None:
        return self.opened.manifest


def read_sorted_adapter(folder: Path) -> SortedAdapter:
    """Read an adapter folder and sort its tensors by module; KitError as of `read_adapter_folder`."""
    opened = read_adapter_folder(folder)
    assert opened.tensors is not None  # only an accepted pickle has none
    adapter = SortedAdapter(opened, {}, {}, set(), {}, [])
    for key, tensor in opened.tensors.items():
        _sort_tensor(adapter, key, tensor)
    return adapter


def _sort_tensor(adapter: SortedAdapter, key: str, tensor: TensorEntry) -> None:
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


def reason_for_peft(adapter: SortedAdapter) -> str:
    """Why this adapter needs peft to merge it; empty where the streaming merge is exact."""
    config = adapter.config
    if config.get("peft_type") != "LORA":
        return f"peft_type is {config.get('peft_type')}"
    if config.get("init_lora_weights") not in PLAIN_INITS:
        return f"init_lora_weights={config['init_lora_weights']} alters the base's weights"
    if config.get("use_dora") and config.get("lora_bias"):
        return "use_dora with lora_bias scales the bias while training and not when merging"
    other = sorted(key for key, value in config.items() if value and key not in STREAMED_SETTINGS)
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


def trained_token_ids(config: dict[str, Any], module: str) -> list[int]:
    """The rows that a module's trainable tokens replace."""
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        return next((list(v) for k, v in indices.items() if module == k or module.endswith("." + k)), [])
    return list(indices or [])


def read_tensor_bytes(tensor: TensorEntry, start: int = 0, end: int | None = None) -> bytearray:
    """Bytes [start, end) of a tensor; KitError where the file ends early."""
    size = (tensor.end - tensor.start if end is None else end) - start
    data = bytearray(size)
    with open(tensor.file, "rb") as file:
        file.seek(tensor.start + start)
        if file.readinto(data) != size:
            raise KitError(f"{tensor.file} ended early", fix="fetch the file again")
    return data
