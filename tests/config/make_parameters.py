"""Write kit/inspection/parameters.json from transformers: `python tests/config/make_parameters.py`.

The modules of an architecture with the shapes of their parameters, as sums of products of keys of config.json. Each is
found by building the architecture without memory, many times, with one key changed. What no such sum explains, or
whose layers differ otherwise than dense and mixture of experts, is left out: `kit check` then counts nothing.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import re
from typing import Any

TARGET = pathlib.Path(__file__).parents[2] / "kit" / "inspection" / "parameters.json"
TYPES = """llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text phi phi3 phimoe glm glm4
    glm4_moe opt gpt2 gpt_neox gpt_oss gptj bloom olmo olmo2 olmo3 olmoe granite granitemoe deepseek_v2
    deepseek_v3 cohere cohere2 starcoder2 stablelm smollm3 ernie4_5 ernie4_5_moe exaone4 seed_oss helium
    ministral3 arcee minimax_m2""".split()
SIZES = """hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size d_model
    moe_intermediate_size num_experts num_local_experts n_routed_experts n_shared_experts n_embd n_head n_inner
    shared_expert_intermediate_size q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim ffn_dim
    word_embed_proj_dim n_positions max_position_embeddings moe_num_experts moe_num_shared_experts""".split()
FLAGS = "attention_bias mlp_bias use_bias qkv_bias use_qkv_bias enable_bias bias attention_out_bias".split()
# With another value than the class's the modules are others: counted for the class's own alone.
FIXED = """use_qk_norm qk_layernorm new_decoder_architecture use_parallel_residual add_cross_attention
    do_layer_norm_before layer_norm_elementwise_affine moe_layer_freq""".split()  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
SMALL = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 3,
         "vocab_size": 352, "d_model": 96, "moe_intermediate_size": 56, "num_experts": 5, "num_local_experts": 5,
         "n_routed_experts": 8, "n_shared_experts": 3, "n_embd": 96, "n_head": 6,
         "shared_expert_intermediate_size": 88, "q_lora_rank": 40, "kv_lora_rank": 44, "qk_rope_head_dim": 12,
         "qk_nope_head_dim": 20, "v_head_dim": 28, "ffn_dim": 200, "word_embed_proj_dim": 96, "n_positions": 312,
         "max_position_embeddings": 312, "moe_num_experts": 7, "moe_num_shared_experts": 3}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# What a missing key is, where it depends on the others.
HEAD_SIZE = "hidden_size/num_attention_heads"  # where the code divides, whatever head_dim says
DERIVED = {"head_dim": "hidden_size/num_attention_heads", "num_key_value_heads": "num_attention_heads",
           "n_inner": "4*n_embd"}  # fmt: skip


def build_model(model_type: str, changes: dict[str, Any]) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **changes)
    with torch.device("meta"):
        return config, AutoModelForCausalLM.from_config(config)


def module_types(model: Any) -> dict[str, str]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = ((nn.Linear, "linear"), (Conv1D, "conv1d"), (nn.Embedding, "embedding"))
    return {n: next((k for c, k in kinds if isinstance(m, c)), "other") for n, m in model.named_modules()}


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def candidate_terms(configs: list[dict[str, int]]) -> dict[tuple[float, ...], str]:
    """Value in every config -> the shortest product of keys that has it."""
    order = ["head_dim", "num_attention_heads", "num_key_value_heads", *configs[0]]
    keys = [k for k in dict.fromkeys(order) if all(isinstance(c.get(k), int) for c in configs)]
    terms: dict[tuple[float, ...], str] = {}
    for count in (1, 2):
        for names in itertools.combinations(keys, count):
            for factor in (1, 2, 3, 4):
                values = tuple(factor * c[names[0]] * (c[names[1]] if count == 2 else 1) for c in configs)
                terms.setdefault(values, "*".join([*([str(factor)] if factor > 1 else []), *names]))
    return terms


def explain_size(values: tuple[int, ...], terms: dict[tuple[float, ...], str]) -> str | None:
    if len(set(values)) == 1:
        return str(values[0])
    if values in terms:
        return terms[values]
    for first, name in terms.items():
        rest = tuple(v - f for v, f in zip(values, first, strict=True))
        if rest in terms:
            return f"{name}+{terms[rest]}"
        if len(set(rest)) == 1 and rest[0] > 0:
            return f"{name}+{rest[0]}"
    return None


def build_type(model_type: str) -> dict[str, Any] | None:
    from transformers import AutoConfig

    plain = AutoConfig.for_model(model_type)
    known = plain.to_dict()
    count = next((k for k in LAYERS if k in known), None)
    if count is None:
        return None
    base: dict[str, Any] = {count: 3, **{k: v for k, v in SMALL.items() if isinstance(known.get(k), int)}, **TOKENS}
    split = next((k for k in ("first_k_dense_replace", "mlp_only_layers") if k in known), None)
    if split:
        base[split] = 1 if split == "first_k_dense_replace" else [0]
    if isinstance(known.get("head_dim"), int):
        base["head_dim"] = 24
    base["tie_word_embeddings"] = False
    variants: list[dict[str, Any]] = [{}]
    for key in SIZES:
        if isinstance(known.get(key), int):
            same = ("word_embed_proj_dim",) if key == "hidden_size" else ()  # OPT projects where they differ
            variants.append({k: base.get(k, known[k]) * 2 for k in (key, *same) if k in known})
        elif key in known and known[key] is None and key in DERIVED:
            variants.append({key: {"head_dim": 32, "num_key_value_heads": 2, "n_inner": 104}[key]})
    if "head_dim" not in known and "hidden_size" in known:
        variants.append({"head_dim": 32})  # many read one that their class does not declare
    values, shapes, types = [], [], {}
    for change in variants:
        try:
            config, model = build_model(model_type, {**base, **change})
        except Exception:
            continue
        if change and shapes and shapes_of(model).keys() != shapes[0].keys():
            continue
        found = config.to_dict()
        given = {
            k: {**base, **change}.get(k, found.get(k)) for k in dict.fromkeys([*SIZES, *known]) if k in found
        } | change
        for key, formula in DERIVED.items():
            if given.get(key) is None and (value := derive(formula, given)):
                given[key] = value
        sizes = {k: v for k, v in given.items() if k in SIZES and isinstance(v, int) and not isinstance(v, bool)}
        values.append(sizes | ({HEAD_SIZE: head} if (head := derive(HEAD_SIZE, given)) else {}))
        shapes.append(shapes_of(model))
        types = types or module_types(model)
    if not shapes:
        return None
    flags: dict[str, str] = {}
    by_default = set(shapes[0])
    for key in FLAGS:
        if isinstance(known.get(key), bool):
            try:
                other = shapes_of(build_model(model_type, {**base, key: not known[key]})[1])
            except Exception:
                continue
            for name in other.keys() ^ by_default:
                flags.setdefault(name, key)
                if name in other:  # absent by default
                    for one in shapes:
                        one[name] = other[name]
    terms = candidate_terms(values)
    modules: dict[str, Any] = {name: [kind, {}] for name, kind in types.items() if kind != "other"}
    for name in shapes[0]:
        sizes = [explain_size(tuple(s[name][n] for s in shapes), terms) for n in range(len(shapes[0][name]))]
        if name in flags and name not in by_default:
            sizes = bias_size(name, shapes, terms)
        if None in sizes:
            return None
        module, _, leaf = name.rpartition(".")
        key = leaf + (f"?{flags[name]}" if name in flags else "")
        modules.setdefault(module, [types.get(module, "other"), {}])[1][key] = sizes
    return arrange(modules, count, split, plain, values[0])


def bias_size(name: str, shapes: list[Any], terms: dict[tuple[float, ...], str]) -> list[Any]:
    """A bias that one build alone has is as long as the rows of its weight (Conv1D, the other way, has one always)."""
    weight = name.removesuffix("bias") + "weight"
    if name.endswith(".bias") and weight in shapes[0]:
        return [explain_size(tuple(s[weight][0] for s in shapes), terms)]
    return [None]


def derive(formula: str, values: dict[str, Any]) -> int | None:
    if "/" in formula:
        a, b = (values.get(k) for k in formula.split("/"))
        return a // b if isinstance(a, int) and isinstance(b, int) and b else None
    factor, _, key = formula.rpartition("*")
    return int(factor or 1) * values[key] if isinstance(values.get(key), int) else None


def arrange(modules: dict[str, Any], count: str, split: str | None, plain: Any, used: Any) -> dict[str, Any] | None:
    """The modules outside of the layers, and those of a layer of each kind."""
    number = re.compile(r"^(.*?)\.(\d+)\.(.*)$")
    outside: dict[str, Any] = {}
    layers: dict[int, dict[str, Any]] = {}
    prefix = None
    for name, value in modules.items():
        match = number.match(name)
        if not match:
            outside[name] = value
            continue
        if prefix not in (None, match[1]):
            return None
        prefix = match[1]
        layers.setdefault(int(match[2]), {})[match[3]] = value
    if sorted(layers) != [0, 1, 2] or layers[1] != layers[2] or (layers[0] != layers[1] and not split):
        return None
    kinds = {"all": layers[1]} if layers[0] == layers[1] else {"dense": layers[0], "moe": layers[1]}
    text = json.dumps([outside, kinds])
    known = plain.to_dict()
    keys = [k for k in (*SIZES, *FLAGS) if re.search(rf"\b{k}\b", text) and k in known]
    keys += [k for k in ("num_attention_heads", "hidden_size") if k in known and k not in keys]
    aliases = {k: v for k, v in (getattr(plain, "attribute_map", None) or {}).items() if v in (*keys, count)}
    # A default that depends on other keys is none.
    defaults = {k: None if k in DERIVED and k in ("num_key_value_heads", "n_inner") and known[k] is None else known[k]
                for k in keys}  # fmt: skip
    if "head_dim" in defaults:
        wider = type(plain)(hidden_size=2 * known.get("hidden_size", 64)).to_dict()["head_dim"]
        defaults["head_dim"] = None if wider != known["head_dim"] else wider
    return {"layers": prefix, "count": count, "split": split if "dense" in kinds else None, "outside": outside,
            "kinds": kinds, "defaults": defaults, "aliases": aliases,
            "fixed": {k: known[k] for k in FIXED if k in known}, "tied": bool(known.get("tie_word_embeddings")),
            "converted": conversion_of(known["model_type"])}  # fmt: skip


def conversion_of(model_type: str) -> str | None:
    """Whose targets PEFT rewrites for fused experts, as transformers did with the weights."""
    from peft.utils import transformers_weight_conversion as peft_moe

    name = peft_moe._MODEL_TO_CONVERSION_PATTERN.get(model_type)
    known = name in peft_moe._MOE_TARGET_MODULE_MAPPING
    return name if known and peft_moe.get_checkpoint_conversion_mapping(model_type) else None


def build() -> dict[str, Any]:
    from peft import __version__ as peft_version
    from peft.utils import transformers_weight_conversion as peft_moe
    from transformers import __version__

    table = {}
    for model_type in TYPES:
        try:
            table[model_type] = build_type(model_type)
        except Exception as error:
            print(model_type, repr(error)[:200])
            continue
        if table[model_type] is None:
            print(model_type, "is not explained")
            del table[model_type]
    moe = {name: {"targets": targets, "fused": peft_moe._MOE_FUSED_TARGETS.get(name, {})}
           for name, targets in peft_moe._MOE_TARGET_MODULE_MAPPING.items()}  # fmt: skip
    return {"generated_from": {"transformers": __version__, "peft": peft_version}, "moe": moe, "types": table}


def dump(data: dict[str, Any]) -> str:
    """JSON with one model type to a line."""
    lines = ",\n".join(f'  "{k}": {json.dumps(v)}' for k, v in data["types"].items())
    head = f'"generated_from": {json.dumps(data["generated_from"])},\n "moe": {json.dumps(data["moe"])}'
    return f'{{\n {head},\n "types": {{\n{lines}\n }}\n}}\n'


if __name__ == "__main__":
    text = dump(build())
    TARGET.write_text(text)
    print(f"{TARGET.name}: {len(text)} bytes")
