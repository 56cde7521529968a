"""Adapters in PEFT: which tensors belong to one."""

from __future__ import annotations

from typing import Any

from kit.storage.safetensors_header import CONFIG, find_model


def embeddings_changed(model: Any, adapter: str = "default") -> bool:
    """Whether the adapter file must carry the embedding matrices: PEFT's "auto" rule, decided without the network.

    True where the embeddings carry an adapter or where the vocabulary differs from the base's; unknown base: False.
    Embeddings in modules_to_save are in the file as they are: PEFT's rule would write each of them three times.
    (T33, T39; peft/utils/save_and_load.py, get_peft_model_state_dict)
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
    base = config.base_model_name_or_path and find_model(config.base_model_name_or_path, config.revision)
    if not base or not (base / CONFIG).is_file():
        return False
    before = type(model.config).from_pretrained(base).get_text_config().vocab_size
    return before != model.config.get_text_config().vocab_size
