"""The rules of the base model: what its config.json and its headers say against what is asked of it.

Weights are never read. kit/config/rules/table.py lists them.
"""

from __future__ import annotations

import difflib
from typing import Any

from kit.config.rules.context import RuleContext, Violations
from kit.inspection.attention import ATTENTION, ATTENTIONS, FLEX
from kit.schema.dotted import value_at

# A table of learned positions has that many rows, and a longer text an index beyond it: key of config.json.
LEARNED = {
    "gpt2": "n_positions", "openai-gpt": "n_positions", "gpt_bigcode": "n_positions",
    "opt": "max_position_embeddings", "gpt_neo": "max_position_embeddings", "biogpt": "max_position_embeddings",
}  # fmt: skip
# MoE families that DeepSpeed's own list of leaf modules covers (runtime/zero/leaf_module_config.py).
KNOWN_LEAVES = ("mixtral", "qwen2_moe", "qwen3_moe")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Layers that carry a state along the row and take no sequence index, or with their own kernels alone: transformers
# 5.23, models/*/modeling_*.py, and by trial in tests/training/test_packing_proof.py.
RECURRENT = ("mamba", "mamba2", "falcon_mamba", "jamba", "rwkv", "recurrent_gemma", "falcon_h1", "lfm2", "lfm2_moe",
             "nemotron_h", "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "minimax",
             "zamba2", "olmo_hybrid", "bamba", "kimi_linear")  # fmt: skip
# Masks made without positions, so for the whole row; flash attention takes the documents' lengths instead of a mask.
MASKED_BY_ROW = ("afmoe", "biogpt", "bloom", "falcon", "gpt_oss", "granitemoehybrid", "mpt", "opt", "xglm")


def family(run: RuleContext) -> str:
    return str(run.base.text.get("model_type", (run.base.config or {}).get("model_type", "")))


def learned(run: RuleContext) -> int | None:
    """Rows of the table of learned positions; None for a base without one."""
    return as_int(run.base.text.get(LEARNED.get(family(run), "")))


def as_int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def asked_length(run: RuleContext) -> int | None:
    """trainer.max_length; None where rows are not cut."""
    return run.plan["trainer"].get("max_length", 1024)


def length_learned(run: RuleContext) -> Violations:
    reach, length = learned(run), asked_length(run)
    if reach and length and length > reach:
        yield (
            f"the base has learned {reach} positions, rows may have {length} tokens: a longer row is an index error",
            "trainer.max_length",
            f"trainer.max_length={reach}",
        )


def length_uncut(run: RuleContext) -> Violations:
    reach = learned(run)
    if reach and asked_length(run) is None:
        problem = f"the base has learned {reach} positions, and max_length=null cuts no row"
        yield problem, "trainer.max_length", f"trainer.max_length={reach}"


def length_range(run: RuleContext) -> Violations:
    config, length = run.base.text, asked_length(run)
    reach = as_int(config.get("max_position_embeddings"))
    if not reach or not length or family(run) in LEARNED:
        return
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factor = scaling.get("factor") if isinstance(scaling, dict) else None
    # llama3 and longrope state the reach after scaling; the others multiply what stands in config.json.
    if isinstance(factor, int | float) and scaling.get("rope_type", scaling.get("type")) in (
        "linear",
        "dynamic",
        "yarn",
    ):
        reach = int(reach * factor)
    if length > reach:
        yield (
            f"the base was trained on rows of at most {reach} tokens, these may have {length}",
            "trainer.max_length",
            f"trainer.max_length={reach}, or scale its rotary positions in config.json",
        )


def moe_leaf(run: RuleContext) -> Violations:
    config = run.base.text
    experts = next((n for key in EXPERTS if (n := as_int(config.get(key)))), 0)
    kind = family(run)
    if run.zero_stage != 3 or experts < 2 or kind in KNOWN_LEAVES:
        return
    leaves = value_at(run.plan["deepspeed"], "zero_optimization.leaf_module")
    if any(value_at(leaves, key) for key in ("classes", "names", "name_suffixes")):
        return
    key = "deepspeed.zero_optimization.leaf_module"
    yield (
        f"{kind} routes each token to some of {experts} experts, and DeepSpeed's list of leaf modules does not hold "
        "its block: where experts are modules of their own, ranks that route apart wait for each other for ever",
        key,
        f"{key}.classes=[THE CLASS OF ITS EXPERT BLOCK], or deepspeed=zero2",
    )


def autotp_experts(run: RuleContext) -> Violations:
    size = value_at(run.plan["deepspeed"], "tensor_parallel.autotp_size")
    if isinstance(size, int) and size > 1 and any(as_int(run.base.text.get(key)) for key in EXPERTS):
        yield (
            "transformers cannot fuse the stored experts of this base under DeepSpeed's tensor parallelism",
            "deepspeed.tensor_parallel.autotp_size",
            "leave tensor_parallel out",
        )


def autotp_heads(run: RuleContext) -> Violations:
    size = value_at(run.plan["deepspeed"], "tensor_parallel.autotp_size")
    config = run.base.text
    heads = as_int(config.get("num_key_value_heads")) or as_int(
        config.get("num_attention_heads", config.get("n_head"))
    )
    if isinstance(size, int) and size > 1 and heads and heads % size:
        yield (
            f"{heads} key-value heads do not divide by {size}: some ranks get more of the attention than others",
            "deepspeed.tensor_parallel.autotp_size",
            f"a divisor of {heads}",
        )


def packing_recurrent(run: RuleContext) -> Violations:
    t, kind = run.plan["trainer"], family(run)
    if not (t.get("packing") or t.get("padding_free")):
        return
    if kind in RECURRENT:
        problem = f"{kind} has layers with a running state, which can go on from one packed document into the next"
    elif kind in MASKED_BY_ROW and not takes_lengths(run.plan["model"]["attn_implementation"]):
        problem = f"{kind} makes its attention mask without positions, so packed documents can see each other"
    elif run.plan["model"]["trust_remote_code"]:
        problem = "the base brings code of its own, which may not keep packed documents apart"
    else:
        return
    problem += ": the run tries it before the first step, and stops where they see each other"
    yield problem, "trainer.packing", "trainer.packing=false trainer.padding_free=false"


def takes_lengths(attention: str | None) -> bool:
    """Whether an attention keeps packed documents apart by their lengths, whatever the mask says."""
    return attention in (ATTENTION, FLEX) or "flash" in str(attention)


def attention_name(run: RuleContext) -> Violations:
    name = run.plan["model"]["attn_implementation"]
    plain = str(name or "eager").removeprefix("paged|")
    if plain not in ATTENTIONS and "/" not in plain:  # ORGANISATION/KERNEL is a kernel of the Hub
        close = difflib.get_close_matches(plain, ATTENTIONS, 2, 0.4)
        fix = f"did you mean {' or '.join(close)}?" if close else f"one of {', '.join(ATTENTIONS)}"
        yield f"there is no attention implementation {name!r}", "model.attn_implementation", fix


def attention_precision(run: RuleContext) -> Violations:
    if "flash" not in str(run.plan["model"]["attn_implementation"] or ""):
        return
    key, fix = "model.attn_implementation", "model.attn_implementation=sdpa"
    if run.surely_on_cpu:
        yield "flash attention runs on GPUs", key, fix
    elif run.precision == "float32" and not run.on_cpu:
        yield (
            "flash attention computes in bfloat16 or float16, the run in float32",
            key,
            f"{fix}, or trainer.bf16=true",
        )
