"""Which architectures are trained here, why others are not, and what the matrices of the known ones are called.

transformers stays unimported: its model types stand in `architectures.json` (tests/config/make_architectures.py).
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kit.errors import Problem

TABLE = Path(__file__).with_name("architectures.json")

_ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
_LLAMA = [*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
_GLM = [*_ATTENTION, "mlp.gate_up_proj", "mlp.down_proj"]
# Linear layers (GPT-2: Conv1D) by model_type, `*` for the layer. Compared with transformers' models by a test.
LINEARS = {
    **dict.fromkeys(
        ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"],
        [f"model.layers.*.{n}" for n in _LLAMA],
    ),
    **dict.fromkeys(["glm", "glm4"], [f"model.layers.*.{n}" for n in _GLM]),
    "phi3": [
        f"model.layers.*.{n}" for n in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ],
    "phi": [f"model.layers.*.{n}" for n in (*_ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2")],
    "opt": [f"model.decoder.layers.*.{n}" for n in (*_ATTENTION[:3], "self_attn.out_proj", "fc1", "fc2")],
    "gpt2": [f"transformer.h.*.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")],
    **dict.fromkeys(["mixtral", "qwen3_moe"], [f"model.layers.*.{n}" for n in _ATTENTION]),
}
# Leaf names of the matrices with a row per token: where tokens enter and where they are predicted.
INPUT_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
OUTPUT_EMBEDDINGS = ("lm_head", "embed_out", "output_layer")
EMBEDDING_NAMES = (*INPUT_EMBEDDINGS, *OUTPUT_EMBEDDINGS)
EMBEDDING = "model.embed_tokens"
EMBEDDINGS = {"gpt2": "transformer.wte", "opt": "model.decoder.embed_tokens"}  # else EMBEDDING
# One 3-D parameter for all experts of a layer. LoRA reaches it by the names that the matrices had before (PEFT's
# transformers_weight_conversion), and the router, which is no linear layer, by its own; other methods reach neither.
FUSED_EXPERTS = {"mixtral": ("w1", "w2", "w3"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}
ROUTER = "model.layers.*.mlp.gate"
EXPERT_PARAMETERS = ("experts.gate_up_proj", "experts.down_proj", "gate.weight")  # of FUSED_EXPERTS, in a layer's mlp
MOST_LAYERS = 1000  # a larger count is no model's, and a list of names for it no help

TRAINS = "this kit trains causal language models on text"
TOWER_FIXES = {
    "gemma3": "model=gemma3_1b or model=gemma2_9b, or a folder with the text part alone (model_type gemma3_text)"
}


def module_names(config: dict[str, Any]) -> list[str] | None:
    """Names of the embedding, the linear layers and the head; None for an architecture that is not listed."""
    model_type = config.get("model_type")
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    if not isinstance(model_type, str) or model_type not in LINEARS or not isinstance(layers, int):
        return None
    if not 0 < layers <= MOST_LAYERS or config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        return None  # the latter two: some layers of a mixture of experts are dense
    inside = [name.replace("*", str(layer)) for layer in range(layers) for name in LINEARS[model_type]]
    return [EMBEDDINGS.get(model_type, EMBEDDING), *inside, "lm_head"]


def all_module_names(config: dict[str, Any]) -> list[str] | None:
    """List the names of every module: norms, activations, routers and the blocks that hold them too."""
    layers, listed = config.get("num_hidden_layers", config.get("n_layer")), module_names(config)
    if listed is None or not isinstance(layers, int):
        return None
    names = architecture_table()["modules"][config["model_type"]]
    return [name.replace("*", str(layer)) for name in names for layer in range(layers if "*" in name else 1)]


def layer_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """{last name of a layer's matrix: (out_features, in_features)} of the text part; {} where that is not known."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    listed = str(config.get("model_type")) in LINEARS
    if not (listed and isinstance(hidden, int) and isinstance(heads, int) and heads):
        return {}
    inside = config.get("intermediate_size") or config.get("ffn_dim") or 4 * hidden
    head = config.get("head_dim") or hidden // heads
    query, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    if not all(isinstance(n, int) and n > 0 for n in (inside, query, keys)):
        return {}
    shapes = {
        "q_proj": (query, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, query),
        "dense": (hidden, query), "out_proj": (hidden, query), "qkv_proj": (query + 2 * keys, hidden),
        "gate_proj": (inside, hidden), "up_proj": (inside, hidden), "down_proj": (hidden, inside),
        "gate_up_proj": (2 * inside, hidden), "fc1": (inside, hidden), "fc2": (hidden, inside),
    }  # fmt: skip
    return {name: shapes[name] for name in {n.rpartition(".")[2] for n in LINEARS[config["model_type"]]} & set(shapes)}


@functools.cache
def architecture_table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def model_kind(model_type: str) -> str | None:
    """`causal`, `multimodal`, `encoder_decoder` or `encoder`; None where transformers has no such language model."""
    return next((k for k, names in architecture_table()["kinds"].items() if model_type in names), None)


def decoder_layer_classes(text: dict[str, Any]) -> list[str]:
    """List the classes of the decoder layers that ZeRO-3 can gather whole; [] where that is not known.

    text: the config of the language model. A repository's own code has classes of its own.
    """
    return [] if text.get("auto_map") else architecture_table()["decoder_layers"].get(str(text.get("model_type")), [])


def refuse_name(name: str) -> list[Problem]:
    """What a Hub id says before its config.json is here."""
    if re.search(r"Llama-3\.2-(11B|90B)-Vision", name, re.IGNORECASE):
        return [tower_problem(name, "mllama", "90b" in name.lower())]
    if re.search(r"(^|/)chatglm\d?-6b", name, re.IGNORECASE):
        return [own_code_problem(name)]
    return []


def refuse_config(
    name: str, config: dict[str, Any], remote_code: bool, key: str = "model.name_or_path"
) -> tuple[list[Problem], list[str]]:
    """Problems of an architecture that cannot be trained here, and notes on one that cannot be judged.

    `key`: where the config comes from. `remote_code`: the user allows the repository's own code.
    """
    if "model_type" not in config:
        return [], []
    model_type = str(config["model_type"])
    if model_type == "chatglm":
        return [own_code_problem(name, key)], []
    if remote_code and config.get("auto_map"):
        return [], []
    what = model_kind(model_type)
    if what == "multimodal":
        text = config.get("text_config")
        large = isinstance(text, dict) and text.get("hidden_size") == 8192
        return [tower_problem(name, model_type, large or "90b" in name.lower(), key)], []
    if what == "encoder_decoder" or config.get("is_encoder_decoder") is True:
        problem = f"{name} is an encoder-decoder model ({model_type}); {TRAINS}"
        fix = "train it with transformers' own Seq2SeqTrainer, or choose a causal model: kit list model"
        return [Problem(problem, key, fix, "architecture")], []
    if what == "encoder" and not (config.get("is_decoder") or config.get("causal")):
        problem = f"{name} is an encoder ({model_type}): it sees the words to come; {TRAINS}"
        fix = "train it with transformers' own Trainer, or choose a causal model: kit list model"
        return [Problem(problem, key, fix, "architecture")], []
    if what is None:
        return unknown_type_problem(name, model_type, bool(config.get("auto_map")), key)
    return [], []


def tower_problem(name: str, model_type: str, large: bool, key: str = "model.name_or_path") -> Problem:
    fix = TOWER_FIXES.get(model_type, "a text model of the same family: kit list model")
    if model_type == "mllama":
        fix = f"model={'llama3_1_70b' if large else 'llama3_1_8b'}: its text layers are those of Llama 3.1"
    kind = "vision" if model_type in ("mllama", "gemma3") else "vision or audio"
    return Problem(f"{name} has a {kind} tower; this kit trains text", key, fix, "architecture")


def own_code_problem(name: str, key: str = "model.name_or_path") -> Problem:
    problem = f"{name} needs code of its own, which was written for transformers 4 and does not run on 5"
    return Problem(problem, key, "model=glm4_9b, or recipe=glm4_9b_int8_lora", "architecture")


def unknown_type_problem(name: str, model_type: str, own: bool, key: str) -> tuple[list[Problem], list[str]]:
    """Refused, unless the installed transformers is another one than the table's: it may know more."""
    made_from = architecture_table()["generated_from"]["transformers"]
    text = f"transformers {made_from} has no causal language model of type {model_type!r} ({name})"
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        installed = made_from
    if installed != made_from:
        return [], [f"{text}; {installed} is installed, and was not asked"]
    close = difflib.get_close_matches(model_type, architecture_table()["kinds"]["causal"], 1)
    fix = f"did you mean {close[0]}?" if close else "choose another model: kit list model"
    if own:
        fix = "its repository brings code of its own: read it, then model.trust_remote_code=true on the command line"
    return [Problem(text, key, fix, "architecture")], []
