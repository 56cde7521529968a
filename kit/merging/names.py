"""Which stored tensor of a base belongs to which module, asked of transformers' own loading rules.

Adapters name modules (`model.layers.0.self_attn.q_proj`), checkpoints name tensors, and transformers renames and fuses
between the two when it loads. The model is built on the meta device, so a 70B base costs no memory here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.errors import KitError
from kit.models.open import architecture_class, forget_deepspeed
from kit.storage.safetensors_header import TensorEntry


@dataclass
class TensorNames:
    """`stored`: parameter name -> checkpoint name; `kinds`: module -> linear | conv1d | embedding | other."""

    stored: dict[str, str]
    kinds: dict[str, str] | None = None  # None: the model's code is its own, so modules are not known
    fused: set[str] = field(default_factory=set)  # parameters made of several stored tensors
    tied: dict[str, str] = field(default_factory=dict)  # parameter -> the parameter whose storage it shares
    converts: bool = False  # the model type has renames of its own
    note: str = ""

    def kind(self, module: str) -> str | None:
        """The kind of a module; "unknown" where the model's code is its own, None where the model lacks the module."""
        return "unknown" if self.kinds is None else self.kinds.get(module)


def build_on_meta(base: Path) -> Any:
    """The base's model with shapes only."""
    import torch
    import transformers

    forget_deepspeed()
    config = transformers.AutoConfig.from_pretrained(base)
    cls = architecture_class(config)
    with torch.device("meta"):
        return cls.from_config(config) if cls is transformers.AutoModelForCausalLM else cls(config)


def map_tensor_names(base: Path, config: dict[str, Any], tensors: dict[str, TensorEntry]) -> TensorNames:
    """Names for a base; a model with code of its own is stored as it is built, so its names stand for themselves.

    KitError where transformers cannot build a model from the base's config.
    """
    try:
        return _map_by_transformers(base, config, tensors)
    except KitError:
        raise
    except Exception as error:  # whatever a model class raises when it is built from this config
        raise KitError(
            f"{base} cannot be built as a model: {type(error).__name__}: {error}",
            where="config.json",
            fix="check the base and the installed transformers",
        ) from error


def _map_by_transformers(base: Path, config: dict[str, Any], tensors: dict[str, TensorEntry]) -> TensorNames:
    if config.get("auto_map") and not _is_native(config):
        return TensorNames(
            {name: name for name in tensors},
            note="the base has code of its own: stored names were taken as module names",
        )

    from torch import nn
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.pytorch_utils import Conv1D

    model = build_on_meta(base)
    kinds = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            kinds[name] = "conv1d"
        elif isinstance(module, nn.Linear):
            kinds[name] = "linear"
        else:
            kinds[name] = "embedding" if isinstance(module, nn.Embedding) else "other"
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    stored: dict[str, str] = {}
    fused: set[str] = set()
    for name in tensors:
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is not None or parameter in stored:
            fused.add(parameter)
        stored.setdefault(parameter, name)
    for parameter in state.keys() - stored.keys():  # what a split leaves without a stored tensor of its own
        if converters:
            fused.add(parameter)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    fused -= tied.keys() - stored.keys()
    return TensorNames(
        stored, kinds, fused, tied, converts=bool(get_model_conversion_mapping(model, add_legacy=False))
    )


def _is_native(config: dict[str, Any]) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return config.get("model_type") in CONFIG_MAPPING_NAMES
