"""Opening a base model: one door for training, generation, evaluation and the checks of a merge."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kit.errors import ENVIRONMENT, KitError, first_line
from kit.models.quantization import bnb_config, disable_cpu_repacking


def open_base(
    name_or_path: str | Path,
    *,
    dtype: Any,
    quantization: Mapping[str, Any] | None = None,
    device: str | None = None,
    model_class: Any = None,
    keep_deepspeed: bool = False,
    **settings: Any,
) -> Any:
    """Load a causal language model, quantized by bitsandbytes where `quantization` says how.

    Args:
        name_or_path: a folder or a Hub id.
        dtype: of the weights, before they are quantized.
        quantization: the plan's section, None for weights as they are stored.
        device: "cpu", "cuda" or "auto" (over the GPUs, then host memory); None leaves the model where transformers
            loads it: on the CPU, a quantized one on the process's current GPU if there is one (peft#2016).
        model_class: AutoModelForCausalLM unless given.
        keep_deepspeed: keep the DeepSpeed setting of this process, as training needs it: under ZeRO-3 the weights
            arrive sharded. Else it is forgotten, since every weight would arrive with shape (0,).
        settings: what from_pretrained takes besides (revision, trust_remote_code, attn_implementation, ...).

    Raises KitError where the files lack a tensor of the model, which transformers would fill with random numbers.
    """
    if model_class is None:
        from transformers import AutoModelForCausalLM as model_class
    if not keep_deepspeed:
        forget_deepspeed()
    if quantization:
        settings["quantization_config"] = bnb_config(quantization)
    if device is not None and (quantization or device == "auto"):  # such a model may not be moved afterwards
        settings["device_map"] = "auto" if device == "auto" else {"": device}
    model, info = model_class.from_pretrained(
        str(name_or_path), dtype=dtype, use_safetensors=True, output_loading_info=True, **settings
    )
    if missing := sorted(info["missing_keys"]):
        raise KitError(
            f"{name_or_path} lacks {len(missing)} tensors of a {type(model).__name__}, the first {missing[0]}",
            where=str(name_or_path),
            fix="give a complete causal language model",
        )
    if quantization:
        disable_cpu_repacking(model)
    if device is not None and "device_map" not in settings:
        model = model.to(device)
    return model


def forget_deepspeed() -> None:
    """Drop a ZeRO-3 setting left by training in this process: every weight would be loaded with shape (0,)."""
    module = sys.modules.get("transformers.integrations.deepspeed")
    if module is not None:
        module.unset_hf_deepspeed_config()


def architecture_class(config: Any) -> Any:
    """The transformers class that a base's config names, else AutoModelForCausalLM."""
    import transformers

    for name in getattr(config, "architectures", None) or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


def embedding_row_count(model: Any) -> int:
    """Rows of the input embedding, also where ZeRO-3 left an empty placeholder."""
    weight = model.get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def resize_embeddings(model: Any, rows: int) -> None:
    """Give both embeddings `rows` rows; the new ones are drawn around the mean of the old, always alike."""
    if rows != embedding_row_count(model):
        import torch

        torch.manual_seed(0)
        model.resize_token_embeddings(rows)


@contextlib.contextmanager
def library_errors(path: Path) -> Iterator[None]:
    """Say a library's failure on a damaged or unsuitable folder as a KitError."""
    try:
        yield
    except KitError:
        raise
    except ImportError as error:
        raise KitError(
            f"{path} needs a package that is missing: {error}", fix="install it", code=ENVIRONMENT
        ) from error
    except Exception as error:  # noqa: BLE001 - safetensors, tokenizers and remote code raise their own types
        if "out of memory" in str(error).lower():
            raise KitError(f"{path} does not fit into memory", code=ENVIRONMENT, fix="use a smaller dtype") from error
        lines = str(error).strip().splitlines()
        reason = (
            " ".join(line.strip() for line in lines[:2]) if lines and lines[0].endswith(":") else first_line(error)
        )
        raise KitError(
            f"{path} cannot be loaded: {reason}",
            where=str(path),
            fix="give a folder that transformers and peft can load; copy or fetch its files again",
        ) from error
