"""The rules of the base model: what its config.json and its headers say against what is asked of it.

Weights are never read. kit/config/rules/table.py lists them.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from kit.config.added_tokens import is_tied
from kit.config.rules.context import RuleContext, Violations
from kit.config.rules.launch import checkpointing
from kit.inspection import architectures
from kit.schema.dotted import value_at

# A table of learned positions has that many rows, and a longer text an index beyond it: key of config.json.
LEARNED = {
    "gpt2": "n_positions", "openai-gpt": "n_positions", "gpt_bigcode": "n_positions",
    "opt": "max_position_embeddings", "gpt_neo": "max_position_embeddings", "biogpt": "max_position_embeddings",
}  # fmt: skip
# MoE families that DeepSpeed's own list of leaf modules covers (runtime/zero/leaf_module_config.py).
KNOWN_LEAVES = ("mixtral", "qwen2_moe", "qwen3_moe")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Layers that carry a state along the row and take no sequence index: transformers 5.23, models/*/modeling_*.py.
RECURRENT = ("mamba", "mamba2", "falcon_mamba", "jamba", "rwkv", "recurrent_gemma", "falcon_h1", "lfm2", "lfm2_moe",
             "nemotron_h", "qwen3_next", "qwen3_5", "qwen3_5_moe", "minimax", "zamba2", "olmo_hybrid")  # fmt: skip
ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def family(run: RuleContext) -> str:
    return str(run.base.text.get("model_type", (run.base.config or {}).get("model_type", "")))


def learned(run: RuleContext) -> int | None:
    """Rows of the table of learned positions; None for a base without one."""
    return whole(run.base.text.get(LEARNED.get(family(run), "")))


def whole(value: Any) -> int | None:
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
    reach = whole(config.get("max_position_embeddings"))
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
    experts = next((n for key in EXPERTS if (n := whole(config.get(key)))), 0)
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
    if isinstance(size, int) and size > 1 and any(whole(run.base.text.get(key)) for key in EXPERTS):
        yield (
            "transformers cannot fuse the stored experts of this base under DeepSpeed's tensor parallelism",
            "deepspeed.tensor_parallel.autotp_size",
            "leave tensor_parallel out",
        )


def autotp_heads(run: RuleContext) -> Violations:
    size = value_at(run.plan["deepspeed"], "tensor_parallel.autotp_size")
    config = run.base.text
    heads = whole(config.get("num_key_value_heads")) or whole(config.get("num_attention_heads", config.get("n_head")))
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
        problem = f"{kind} has layers with a running state, which goes on from one packed document into the next"
    elif run.plan["model"]["trust_remote_code"]:
        problem = "the base brings code of its own: whether it keeps packed documents apart is not known"
    else:
        return
    yield problem, "trainer.packing", "trainer.packing=false trainer.padding_free=false"


def attention_name(run: RuleContext) -> Violations:
    name = run.plan["model"]["attn_implementation"]
    plain = str(name or "eager").removeprefix("paged|")
    if plain not in ATTENTIONS and "/" not in plain:  # ORGANISATION/KERNEL is a kernel of the Hub
        near = difflib.get_close_matches(plain, ATTENTIONS, 2, 0.4)
        fix = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(ATTENTIONS)}"
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


# ---- the adapter against the base ----


def lm_head_target(run: RuleContext) -> Violations:
    targets = (run.plan["peft"] or {}).get("target_modules")
    named = [targets] if isinstance(targets, str) else targets or []
    if any(t == "lm_head" or str(t).endswith(".lm_head") for t in named):
        yield (
            "lm_head cannot be a LoRA target: the trainer's fused loss reads its weight directly",
            "peft.target_modules",
            "drop it, or train it whole: peft.modules_to_save=[lm_head]",
        )


def targets_match_nothing(run: RuleContext) -> Violations:
    targets = (run.plan["peft"] or {}).get("target_modules")
    if not targets or targets == "all-linear" or run.base.modules is None:
        return
    if isinstance(targets, str):
        try:
            matched = [m for m in run.base.modules if re.fullmatch(targets, m)]
        except re.error as error:
            yield (
                f"target_modules is no regular expression: {error}",
                "peft.target_modules",
                "list names, or all-linear",
            )
            return
        dead = [] if matched else [targets]
    else:
        dead = [t for t in targets if not any(m == t or m.endswith(f".{t}") for m in run.base.modules)]
    if dead:
        fused = family(run) in architectures.FUSED_EXPERTS
        why = ": its experts are fused 3-D parameters, LoRA reaches the attention only" if fused else ""
        yield (
            f"no module of the base is named {', '.join(map(str, dead))}{why}",
            "peft.target_modules",
            f"all-linear, or some of {', '.join(inner(run.base.modules))}",
        )


def inner(modules: list[str]) -> list[str]:
    """The last names of the layers' own matrices."""
    return sorted({m.rsplit(".", 1)[-1] for m in modules if not m.endswith(("lm_head", "norm"))})


def patterns_match_nothing(run: RuleContext) -> Violations:
    """PEFT reads a key of rank_pattern and alpha_pattern as the end of a module's name, or as an expression for it."""
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = (run.plan["peft"] or {}).get(name)
        if run.base.modules is None or not isinstance(pattern, dict):
            continue
        for key in pattern:
            try:
                hit = any(re.match(rf"(.*\.)?({key})$", m) for m in run.base.modules)
            except re.error:
                hit = False
            if not hit:
                problem = f"{name} names {key}, and no module of the base has that name: PEFT passes over it"
                yield problem, f"peft.{name}", f"one of {', '.join(inner(run.base.modules))}"


def saved_match_nothing(run: RuleContext) -> Violations:
    saved = (run.plan["peft"] or {}).get("modules_to_save")
    if not isinstance(saved, list) or run.base.modules is None or family(run) not in architectures.LINEARS:
        return
    parts = {part for m in run.base.modules for part in m.split(".")}
    for name in saved:
        last = str(name).rpartition(".")[2]
        if last not in parts and not re.search(r"norm|ln_|rotary|positions|wpe|act", last):
            near = difflib.get_close_matches(last, sorted(parts), 2)
            fix = f"did you mean {' or '.join(near)}?" if near else "peft.modules_to_save=[embed_tokens,lm_head]"
            problem = f"no module of the base is named {name}: PEFT would train and save nothing for it, in silence"
            yield problem, "peft.modules_to_save", fix


def loftq_packages(run: RuleContext) -> Violations:
    from importlib.util import find_spec

    if (run.plan["peft"] or {}).get("init_lora_weights") == "loftq" and find_spec("scipy") is None:
        yield (
            "init_lora_weights=loftq needs scipy, which is not installed",
            "peft.init_lora_weights",
            "pip install scipy",
        )


def layers_range(run: RuleContext) -> Violations:
    peft = run.plan["peft"] or {}
    given, pattern = peft.get("layers_to_transform"), peft.get("layers_pattern")
    key, asked = "peft.layers_to_transform", given if isinstance(given, list) else [given]
    if isinstance(peft.get("target_modules"), str):
        for name, value in (("layers_to_transform", given), ("layers_pattern", pattern)):
            if value is not None:
                fix = "peft.target_modules=[q_proj,v_proj]"
                yield f"{name} needs target_modules as a list of names", f"peft.{name}", fix
    elif pattern and not given:
        yield "layers_pattern without layers_to_transform", "peft.layers_pattern", "peft.layers_to_transform=[0,1]"
    layers = whole(run.base.text.get("num_hidden_layers", run.base.text.get("n_layer")))
    beyond = [n for n in asked if isinstance(n, int) and layers and not 0 <= n < layers]
    if beyond:
        problem = f"the base has layers 0 to {layers - 1}: {', '.join(map(str, beyond))} does not exist"  # type: ignore[operator]
        yield problem, key, f"numbers below {layers}"


def tied_target(run: RuleContext) -> Violations:
    targets = (run.plan["peft"] or {}).get("target_modules")
    ends = (
        [t for t in targets if str(t).rpartition(".")[2] in ("embed_tokens", "wte")]
        if isinstance(targets, list)
        else []
    )
    if ends and is_tied(run.base):
        yield (
            f"{ends[0]} is tied to the output: LoRA trains the input side, and merging changes both",
            "peft.target_modules",
            f"peft.modules_to_save=[{ends[0]}] peft.ensure_weight_tying=true trains the matrix whole",
        )


def tied_saved(run: RuleContext) -> Violations:
    peft = run.plan["peft"] or {}
    saved = peft.get("modules_to_save")
    ends = (
        [s for s in saved if str(s).rpartition(".")[2] in ("embed_tokens", "wte", "lm_head")]
        if isinstance(saved, list)
        else []
    )
    if ends and is_tied(run.base) and not peft.get("ensure_weight_tying"):
        yield (
            f"{', '.join(ends)} is one end of a tied matrix: the ends part, and the merged model grows by one of them",
            "peft.modules_to_save",
            "peft.ensure_weight_tying=true keeps them one",
        )


def prefix_checkpointing(run: RuleContext) -> Violations:
    kind = str((run.plan["peft"] or {}).get("peft_type", "")).upper()
    if kind in ("PREFIX_TUNING", "CARTRIDGE") and checkpointing(run):
        problem = f"{kind} keeps a cache, which recomputed activations do not have"
        yield problem, "trainer.gradient_checkpointing", "trainer.gradient_checkpointing=false"
