"""What autograd keeps of a decoder layer for the backward, in bytes, from config.json alone.

activations.json holds formulas that were measured (tests/forecast/make_activations.py). Their symbols are those of
`sizes`; of two letters joined by `_` (`k_m`) the product is meant.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.inspection.architectures import architecture_table
from kit.inspection.attention import FLEX, WITHOUT_FLEX

TABLE = Path(__file__).with_name("activations.json")


def sizes(text: dict[str, Any]) -> dict[str, int]:
    """The sizes of a language model that activations depend on, by the symbols of the table; 0 where it has none.

    h hidden, i MLP, H heads, G key/value heads, D a head, q and kv all of them, k experts per token, m MLP of an
    expert, s shared MLP, E experts. Multi-head latent attention: A and C ranks of queries and of keys and values, R
    rotary part of a head, n width of all heads without it, v width of all values.
    """

    def first(*names: str) -> int:
        return next((int(text[name]) for name in names if isinstance(text.get(name), (int, float))), 0)

    hidden, heads = first("hidden_size", "n_embd", "d_model"), first("num_attention_heads", "n_head", "n_heads") or 1
    head = first("head_dim") or hidden // heads
    groups = first("num_key_value_heads", "num_kv_heads") or heads
    if text.get("model_type") == "falcon" and not text.get("new_decoder_architecture"):
        groups = 1 if text.get("multi_query", True) else heads
    mlp = first("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim") or 4 * hidden
    expert = first("moe_intermediate_size") or mlp
    rotary, plain = first("qk_rope_head_dim"), first("qk_nope_head_dim")
    if plain:
        head, groups = rotary + plain, heads
    return {
        "h": hidden, "i": mlp, "H": heads, "G": groups, "D": head, "q": heads * head, "kv": groups * head,
        "k": first("num_experts_per_tok"), "m": expert,
        "E": first("num_local_experts", "num_experts", "n_routed_experts"),
        "s": first("n_shared_experts") * expert or first("shared_expert_intermediate_size"),
        "A": first("q_lora_rank"), "C": first("kv_lora_rank"), "R": rotary, "n": heads * plain,
        "v": heads * first("v_head_dim"),
    }  # fmt: skip


def evaluate(formula: str, values: dict[str, int]) -> int:
    """Compute a formula of the table, such as `18h+8i+4k_m+8`."""
    total = 0
    for sign, number, symbols in re.findall(r"([+-]?)(\d+)([A-Za-z_]*)", formula):
        factor = math.prod(values[s] for s in symbols.split("_")) if symbols else 1
        total += (-1 if sign == "-" else 1) * int(number) * factor
    return total


@dataclass(frozen=True)
class Saved:
    """What autograd keeps from forward to backward, without checkpointing or with the selective one.

    bytes_per_token_layer x tokens x layers, and outside_per_token x tokens beside them (negative: the first layer
    keeps less, for nothing before it is trained); bytes_per_layer x layers whatever the tokens; copies_per_parameter
    for each trained parameter that is a matrix (autocast's copies in 16 bits). One layer that is computed anew keeps
    recomputed_per_token at once, its peak.
    """

    bytes_per_token_layer: int
    outside_per_token: int
    bytes_per_layer: int
    copies_per_parameter: int
    recomputed_per_token: int
    formula: str
    source: str
    exact: bool  # measured for this model type, these targets and settings; else the nearest that keeps more


def saved_per_token(
    text: dict[str, Any],
    *,
    peft: dict[str, Any] | None,
    base_dtype: str = "bfloat16",
    adapter_dtype: str = "float32",
    autocast: bool = True,
    selective: bool = False,
    row_tokens: int = 0,
    attention: str | None = None,
    liger: bool = False,
) -> Saved:
    """Say what a decoder layer keeps for each token.

    Args:
        text: the language model's config.json.
        peft: keys of LoraConfig (r, target_modules, lora_dropout ...); None for full fine-tuning.
        base_dtype: of the weights, as they compute: bfloat16 for a base quantized by bitsandbytes.
        autocast: whether the forward runs under torch.autocast to 16 bits (Trainer without DeepSpeed). An adapter's
            inputs are not copied to its dtype then (PEFT's cast_input_dtype_enabled is off).
        selective: checkpointing that keeps the results of linear layers and of attention, and computes the rest anew.
        row_tokens: of a row, or the mean document that attends to itself: eager attention keeps its scores.
        attention: attn_implementation on a GPU; None: what transformers takes.
        liger: Liger's norms keep their input in 16 bits in place of 32, and its activation no result of its own.
    """
    group, exact = find_group(text)
    values = {**sizes(text), "r": adapter_rank(peft or {})}
    bits16 = {"float16": "bfloat16"}
    base_dtype, adapter_dtype = bits16.get(base_dtype, base_dtype), bits16.get(adapter_dtype, adapter_dtype)
    key = f"full {base_dtype}{' autocast' if autocast else ''}"
    if peft is not None:
        name, covered = find_targets(group["targets"], peft)
        # float32 bases are measured without autocast, where they keep more; float32 adapters on others with it
        mixed = base_dtype == "float32" and autocast or adapter_dtype == "float32" != base_dtype and not autocast
        numbers = "float32" if base_dtype == "float32" else adapter_dtype + " autocast" * autocast
        key = f"lora {numbers} {name}{' dropout' if peft.get('lora_dropout') else ''}"
        exact = exact and covered and not mixed
    (token, squared, outside, layer), factor, found = find_row(group["rows"], key)
    if (kept_scores := scores_are_kept(text, attention)) is not None:
        squared = EAGER_SCORES if kept_scores else "0"
    if liger:
        token += LIGER_LESS if values["k"] else LIGER_LESS + LIGER_LESS_GATED
    formula = f"{'2x(' * (factor > 1)}{token}{f'+({squared})t' * (squared != '0')}{')' * (factor > 1)}"
    full = kept = factor * (evaluate(token, values) + row_tokens * evaluate(squared, values))
    exact, source = exact and found, f"{TABLE.name}: {next(iter(group['types']))}, {key}"
    beside = evaluate(outside, values)
    if selective:
        number = 4 if base_dtype == "float32" and not autocast else 2
        residual = 4 if base_dtype == "float32" else 2
        width, letter = values["v"] or values["q"], "v" if values["v"] else "q"
        kept = residual * values["h"] + number * evaluate(group["outputs"], values)
        formula = f"{residual}h+{number}({group['outputs']})"
        if attention != FLEX:  # whose compiled operator the policy does not see: it is computed again
            kept, formula = kept + number * width + 4 * values["H"], f"{formula}+{number}{letter}+4H"
        exact, beside = exact and squared == "0" and not values["k"], max(beside, 0)
    copies = re.search(r"(\d+)P", layer)
    return Saved(
        kept,
        beside,
        evaluate(layer, {**values, "P": 0}),
        int(copies[1]) if copies else 0,
        full,
        formula,
        source,
        exact,
    )


# What a token keeps less with Liger's kernels, from what they save for the backward (ops/rms_norm.py, ops/swiglu.py):
# two norms 2h each, a gated MLP 2i. On an H200 Llama-3.1-8B took 50.2 GiB with them, 50.5 forecast, 61.5 without.
LIGER_LESS, LIGER_LESS_GATED = "-4h", "-2i"
EAGER_SCORES = "8H"  # for each other token: float32 weights, their copy in 16 bits, and what the mask was added to


def scores_are_kept(text: dict[str, Any], attention: str | None) -> bool | None:
    """Whether attention keeps the scores of all tokens; None: as the table's models do."""
    if attention == "eager":
        return True
    if attention is None or attention == FLEX and text.get("model_type") in WITHOUT_FLEX:
        return None
    return False


ONE_INPUT = ("silu", "swish", "gelu", "gelu_pytorch_tanh")  # activations that keep their input and nothing else


@functools.cache
def read_table() -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = json.loads(TABLE.read_text())["groups"]
    return groups


def find_group(text: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The entry of a model type, and whether its settings are those measured; else the one that keeps most."""
    groups, kind = read_table(), str(text.get("model_type"))
    for group in groups:
        if kind in group["types"]:
            switches = group["types"][kind].items()
            return group, all(
                text.get(k) in (None, v) or (text[k] in ONE_INPUT and v in ONE_INPUT) for k, v in switches
            )
    values, typical = {**sizes(text), "r": 16}, "lora float32 autocast all"
    eager = kind in architecture_table()["attention"][FLEX]  # it keeps the scores of all tokens
    alike = [g for g in groups if (g["rows"][typical][1] != "0") == eager]
    if not eager:
        alike = [g for g in alike if ("k_h" in g["rows"][typical][0]) == bool(values["k"])]
    return max(alike, key=lambda g: evaluate(g["rows"][typical][0], values)), False


def find_targets(sets: dict[str, list[str]], peft: dict[str, Any]) -> tuple[str, bool]:
    """The smallest set that holds all targets of an adapter, and whether it is what the adapter has, no more."""
    wanted = peft.get("target_modules")
    plain = not (PARTIAL & {k for k, v in peft.items() if v}) and str(peft.get("peft_type", "LORA")).upper() == "LORA"
    largest = "experts" if "experts" in sets else "all"
    if not isinstance(wanted, Collection) or isinstance(wanted, str):
        return largest, plain and str(wanted).lower() == "all-linear"
    names = {n for n in sets[largest] for w in wanted if n == w or n.endswith(f".{w}")}
    for name, members in sorted(sets.items(), key=lambda item: len(item[1])):
        if names <= set(members):
            return name, plain and names == set(members)
    return largest, False


# LoRA that keeps something else, or in some layers only.
PARTIAL = {"use_dora", "layers_to_transform", "exclude_modules", "target_parameters", "rank_pattern",
           "modules_to_save", "layer_replication", "lora_bias", "alora_invocation_tokens", "use_qalora"}  # fmt: skip


def adapter_rank(peft: dict[str, Any]) -> int:
    return max([int(peft.get("r") or 8), *(peft.get("rank_pattern") or {}).values()])


def find_row(rows: dict[str, list[str]], key: str) -> tuple[list[str], int, bool]:
    """The row of a key, by how much it is to be multiplied, and whether it is measured: else one that keeps more."""
    if key in rows:
        return rows[key], 1, True
    dropout = " dropout" if key.endswith("dropout") else ""
    head = re.sub(r" (qv|attention|mlp|all|experts)( dropout)?$", "", key)
    for other in (f"{head} all{dropout}", f"{head} all"):
        if other in rows:
            return rows[other], 1, False
    other = f"lora bfloat16 all{dropout}" if key.startswith("lora") else "full bfloat16"
    return rows[other], 2, False  # numbers twice as wide
