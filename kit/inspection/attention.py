"""Which attention a base is trained with, chosen from its config.json alone, so that every start of a run picks it."""

from __future__ import annotations

from typing import Any

from kit.inspection.architectures import architecture_table

# Of kit/models/attention.py. With "sdpa" in its name transformers asks whether a model supports sdpa.
ATTENTION = "sdpa_varlen"
FLEX = "flex_varlen"  # for models that sdpa cannot compute: capped logits, sinks
WITHOUT_FLEX = ("hy_v4", "mimo_v2_flash")  # transformers has `_supports_flex_attn = False` for these of FLEX's
ATTENTIONS = (
    "eager", "sdpa", ATTENTION, FLEX, "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4",
)  # fmt: skip


def choose_attention(text: dict[str, Any], trainer: dict[str, Any], deepspeed: dict[str, Any] | None) -> str | None:
    """Return ATTENTION, or FLEX where sdpa cannot compute the model; None: transformers' choice.

    text: the config of the language model. Code of a base's own, torch.compile of the whole model and rows that are
    spread over processes keep what they were written for, and model_init_kwargs what they say.
    """
    if "attn_implementation" in (trainer.get("model_init_kwargs") or {}):
        return None
    if text.get("auto_map") or trainer.get("torch_compile") or trainer.get("torch_compile_backend"):
        return None
    if trainer.get("parallelism_config") or (deepspeed or {}).get("sequence_parallel_size", 1) not in (1, "auto"):
        return None
    kinds, kind = architecture_table()["attention"], str(text.get("model_type"))
    return next((name for name in (ATTENTION, FLEX) if kind in kinds[name]), None)
