"""Adapters in PEFT: put on a base, and which tensors belong to one."""

from __future__ import annotations

import types
import warnings
from typing import Any

from kit.inspection.adapter import (
    AdapterFolder,
    embedding_rows,
    missing_tensors,
    module_or_parameter,
    partial_vocabulary,
    standard_keys,
    unknown_modules,
)
from kit.models.open import embedding_row_count, library_errors, resize_embeddings
from kit.storage.safetensors_header import CONFIG, find_model_folder

# What PEFT's methods share between layers is reported as missing though nothing is (peft_model.py, from_pretrained).
SHARED = ("vblora_vector_bank", "prompt_encoder", ".tinylora_v.", ".unilora_theta_d.")


def attach_adapter(model: Any, adapter: AdapterFolder, *, base_rows: int | None = None, float32: bool = False) -> Any:
    """Put an adapter on its base, both embeddings resized where the adapter holds them so; gives the PeftModel.

    Args:
        base_rows: rows of the stored base's embedding, where the model's were resized since.
        float32: an adapter stored in 16 bits computes in float32; else in the dtype of its base.

    Raises KitError where the adapter and the model that its config makes of the base differ in a tensor.
    """
    from peft import PeftModel, set_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.utils.save_and_load import load_peft_weights

    fit_embeddings_to_adapter(model, adapter, base_rows or embedding_row_count(model))
    folder = adapter.folder
    with library_errors(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=float32)
            # from_pretrained keeps to itself which tensors found no place; the second load changes nothing.
            tensors = load_peft_weights(str(folder), device="cpu")
            keys = standard_keys(tensors)
            loaded: Any = set_peft_model_state_dict(wrapped, {key: tensors[name] for name, key in keys.items()})
        except KeyError as error:  # of a module that is saved whole or whose token rows are trained
            raise missing_tensors(folder, [str(error.args[0])]) from error
    config: Any = wrapped.peft_config["default"]
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    own = [key for key in loaded.missing_keys if prefix in key and "default" in key]
    if missing := [key for key in own if not any(part in key for part in SHARED)]:
        raise missing_tensors(folder, standard_keys(missing).values())
    # A prompt's embeddings are loaded into its encoder, which PEFT does not count.
    prompt = {"prompt_embeddings"} if config.is_prompt_learning else set()
    if unknown := sorted(set(loaded.unexpected_keys) - prompt):
        raise unknown_modules(folder, map(module_or_parameter, unknown))
    return wrapped.eval()


def fit_embeddings_to_adapter(model: Any, adapter: AdapterFolder, base_rows: int) -> None:
    """Resize both embeddings to the rows that the adapter holds; KitError where it holds one end alone."""
    rows = embedding_rows(adapter)
    resized = {count for count in rows.values() if count != base_rows}
    if not resized:
        return
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = ends[1] is None or ends[0].weight is ends[1].weight
    names = {id(module): name for name, module in model.named_modules()}
    behind = [f"{names[id(end)]}.weight" for end in ends if end is not None]
    behind = [name for name in behind if rows.get(name, base_rows) not in resized]
    if len(resized) > 1 or (behind and not tied):
        raise partial_vocabulary(adapter.folder, resized, behind)
    resize_embeddings(model, resized.pop())


def expected_adapter_keys(model: Any, adapter: AdapterFolder) -> set[str]:
    """The keys of the adapter that PEFT makes of a model with the folder's config; the model may be on meta."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(adapter.folder))
    with library_errors(adapter.folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, config, low_cpu_mem_usage=True)
        return set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))


def must_save_embeddings(model: Any, adapter: str = "default") -> bool:
    """Whether the adapter file must carry the embedding matrices: PEFT's "auto" rule, decided without the network.

    True where the embeddings carry an adapter or where the vocabulary differs from the base's; unknown base: False.
    Embeddings in modules_to_save are in the file as they are: PEFT's rule would write each of them three times.
    (peft/utils/save_and_load.py, get_peft_model_state_dict)
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    config = model.peft_config[adapter]
    if not hasattr(model, "get_input_embeddings") or not getattr(model, "config", None):
        return False
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    if all(isinstance(layer, ModulesToSaveWrapper) for layer in layers):
        return False
    tokens_only = (
        config.peft_type == "TRAINABLE_TOKENS" or getattr(config, "trainable_token_indices", None) is not None
    )
    if not tokens_only and any(isinstance(layer, BaseTunerLayer) for layer in layers):
        return True
    base = config.base_model_name_or_path and find_model_folder(config.base_model_name_or_path, config.revision)
    if not base or not (base / CONFIG).is_file():
        return False
    before = type(model.config).from_pretrained(base).get_text_config().vocab_size
    return before != model.config.get_text_config().vocab_size


def leave_casts_to_autocast(model: Any) -> None:
    """Let autocast alone choose the dtype in which plain LoRA computes, in place of a cast there and back.

    PEFT makes the input of an adapter float32, as its weights are, and autocast makes that bfloat16 again at once: no
    bit changes, and each linear layer keeps its input a second time. Dropout and the variants (DoRA and others)
    compute on the input before a matmul does, in the dtype that they find: they keep the cast.
    """
    import torch
    from peft.tuners.lora.layer import Linear

    # Quantized layers and other methods have classes of their own, some of them derived from this one.
    plain: list[Any] = [layer for layer in model.modules() if type(layer) is Linear and not layer.lora_variant]
    for layer in plain:
        if all(isinstance(dropout, torch.nn.Identity) for dropout in layer.lora_dropout.values()):
            layer._cast_input_dtype = types.MethodType(cast_outside_autocast, layer)


def cast_outside_autocast(layer: Any, x: Any, dtype: Any) -> Any:
    """What PEFT does to the input of `layer`, but under autocast, which casts it where it is multiplied."""
    import torch

    if x is not None and torch.is_autocast_enabled(x.device.type):
        return x
    return type(layer)._cast_input_dtype(layer, x, dtype)
