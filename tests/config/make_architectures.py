"""Write kit/inspection/architectures.json from transformers: `python tests/config/make_architectures.py`.

`kit check` says what an architecture is without importing transformers; tests/config/test_architectures.py compares.
"""

from __future__ import annotations

import ast
import inspect
import json
import pathlib
import re
import sys
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from kit.inspection.architectures import LINEARS
from kit.inspection.attention import ATTENTION, FLEX

# Liger has kernels for these too. A trial of tiny models beside transformers' own layers (Triton's interpreter,
# float32, gradients of all weights and of LoRA's) failed where LoRA is put on fused experts, differed by 2e-3 for
# qwen3_5, and could not be made of the rest; all others agreed to 2e-5.
LIGER_LEFT_OUT = {
    "deepseek_v2", "deepseek_v3", "deepseek_v4", "falcon_h1", "gpt_oss",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "llama4", "llama4_text",
    "mixtral", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next",
}  # fmt: skip

TARGET = pathlib.Path(__file__).parents[2] / "kit" / "inspection" / "architectures.json"
PROVEN = pathlib.Path(__file__).with_name("decoder_layers.json")  # of prove_decoder_layers.py


def build() -> dict[str, Any]:
    from transformers import __version__
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    towers = {**auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, **auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    # AutoModelForCausalLM builds the text part alone of some (llama4, qwen3_5): these are causal models here. It does
    # so for mllama too, whose text part has layers that only attend to images.
    multimodal = {t for t, cls in towers.items() if causal.get(t, cls) == cls} | {"mllama"}
    seq2seq = {*auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES}
    masked = {*auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES}
    kinds = {
        "causal": {*causal} - multimodal - seq2seq - masked,
        "multimodal": multimodal,
        "encoder_decoder": seq2seq - multimodal,
        "encoder": masked - seq2seq - multimodal,
    }
    return {
        "generated_from": {"transformers": __version__},
        "kinds": {k: sorted(v) for k, v in kinds.items()},
        "modules": {model_type: list_modules(model_type) for model_type in LINEARS},
        "attention": {
            name: [t for t in sorted(kinds["causal"]) if attention_of(causal[t]) == name] for name in (ATTENTION, FLEX)
        },
        "decoder_layers": {t: decoder_layers(causal[t]) for t in json.loads(PROVEN.read_text())["equal"]},
        "liger": liger_types(kinds["causal"]),
    }


def liger_types(causal: set[str]) -> dict[str, Any]:
    """The architectures that Liger has kernels for and the trial did not leave out; without the package, as known."""
    found = find_spec("liger_kernel")
    if found is None or found.origin is None:
        return json.loads(TARGET.read_text())["liger"]
    source = (pathlib.Path(found.origin).parent / "transformers" / "monkey_patch.py").read_text()
    (table,) = [
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODEL_TYPE_TO_APPLY_LIGER_FN"
    ]
    assert isinstance(table, ast.Dict)
    types = {ast.literal_eval(key) for key in table.keys if key}
    return {"liger_kernel": version("liger-kernel"), "model_types": sorted(types & causal - LIGER_LEFT_OUT)}


def attention_of(class_name: str) -> str | None:
    """The attention of kit/models/attention.py that a class can be given, by its source.

    It must call registered functions, and hand windows on; chunks are not handed on, and some ask for "sdpa" by name.
    """
    import transformers

    cls = getattr(transformers, class_name)
    source = inspect.getsource(sys.modules[cls.__module__])
    windows = "create_sliding_window_causal_mask" in source
    if not cls._can_set_attn_implementation() or "ALL_ATTENTION_FUNCTIONS.get_interface(" not in source:
        return None
    if re.search(r"_attn_implementation [!=]= .(sdpa|flex)|create_chunked_causal_mask", source):
        return None
    if windows and not re.search(r"sliding_window=(self\.|getattr|sliding)", source):
        return None
    if cls._supports_sdpa:
        return ATTENTION
    return FLEX if "def eager_attention_forward" in source and "position_bias" not in source else None


def decoder_layers(class_name: str) -> list[str]:
    """The classes of the layers of a causal model: what is kept on one device, and is checkpointed as a whole."""
    import transformers
    from transformers.modeling_layers import GradientCheckpointingLayer

    cls = getattr(transformers, class_name)
    named = {name: getattr(sys.modules[cls.__module__], name, None) for name in cls._no_split_modules or []}
    layers = [n for n, c in named.items() if isinstance(c, type) and issubclass(c, GradientCheckpointingLayer)]
    return sorted(n for n in layers if "Vision" not in n)  # of a tower in the same file


def list_modules(model_type: str) -> list[str]:
    """List the names of all modules of an architecture, `*` for the layer; no weights are made."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, num_hidden_layers=1))
    return sorted({re.sub(r"\.0(?=\.|$)", ".*", name) for name, _ in model.named_modules() if name})


def dump(data: dict[str, Any]) -> str:
    """JSON with one model type to a line, so that an upgrade reads well as a diff."""
    return json.dumps(data, indent=1) + "\n"


if __name__ == "__main__":
    text = dump(build())
    TARGET.write_text(text)
    print(f"{TARGET.name}: {len(text)} bytes")
