"""The rules of a quantized base: what bitsandbytes, PEFT, DeepSpeed and FSDP cannot do together.

All of them hold before a weight is loaded; kit/config/rules/table.py lists them.
"""

from __future__ import annotations

from importlib.util import find_spec

from kit.config.rules.context import RuleContext, Violations
from kit.inspection.architectures import INPUT_EMBEDDINGS
from kit.schema.dotted import value_at

# Methods that compute with the stored weight itself, as if it were a matrix of floats: tried with peft 0.21, each
# fails in its first step or before. The second list works over int8, whose rows are still rows.
NOT_OVER_BNB = {"DELORA", "FROD", "GLORA", "PSOFT", "SUPERTUNING", "TINYLORA"}
NOT_OVER_4BIT = {"DEFT", "HRA", "LOHA", "LOKR", "PEANUT"}
NEEDS_FLOATS = ("pissa", "loftq", "orthogonal")  # values of init_lora_weights that decompose the weight


def _bits(run: RuleContext) -> int | None:
    q = run.plan["quantization"] or {}
    return 4 if q.get("load_in_4bit") else 8 if q.get("load_in_8bit") else None


def _storage(run: RuleContext) -> str:
    return (run.plan["quantization"] or {}).get("bnb_4bit_quant_storage") or "uint8"


def bits(run: RuleContext) -> Violations:
    q = run.plan["quantization"]
    if not q:
        return
    if q.get("load_in_4bit") and q.get("load_in_8bit"):
        yield "load_in_4bit and load_in_8bit are both true", "quantization", "quantization=nf4 or quantization=int8"
    elif not _bits(run):
        given = ", ".join(f"quantization.{key}" for key in q)
        yield f"quantization=none, but {given} is given", "quantization", "quantization=nf4 or quantization=int8"


def unsaid_defaults(run: RuleContext) -> Violations:
    q = run.plan["quantization"] or {}
    if q.get("load_in_4bit") and not q.get("bnb_4bit_quant_type"):
        yield (
            "load_in_4bit without bnb_4bit_quant_type is fp4, which is less exact than nf4",
            "quantization.load_in_4bit",
            "quantization=nf4, or quantization.bnb_4bit_quant_type=fp4 to mean it",
        )
    if q.get("load_in_4bit") and not q.get("bnb_4bit_compute_dtype") and run.precision != "float32":
        yield (
            "load_in_4bit without bnb_4bit_compute_dtype multiplies in float32, which is slow",
            "quantization.load_in_4bit",
            "quantization.bnb_4bit_compute_dtype=auto",
        )


def full_fine_tuning(run: RuleContext) -> Violations:
    if _bits(run) and not run.plan["peft"]:
        yield "a quantized base cannot be fully fine-tuned", "quantization", "peft=lora, or quantization=none"


def peft_method(run: RuleContext) -> Violations:
    peft = run.plan["peft"]
    if not (bits := _bits(run)) or not peft:
        return
    kind = str(peft.get("peft_type")).upper()
    if kind in NOT_OVER_BNB or (bits == 4 and kind in NOT_OVER_4BIT):
        fix = "peft.peft_type=LORA, or quantization=none"
        yield f"PEFT's {kind} does not work over a {bits}-bit base", "peft.peft_type", fix
    init = peft.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(NEEDS_FLOATS):
        yield (
            f"init_lora_weights={init} decomposes the base's weights, which a quantized base does not have",
            "peft.init_lora_weights",
            "peft.init_lora_weights=true, or quantization=none",
        )


def trained_whole(run: RuleContext) -> Violations:
    """modules_to_save copies a module and trains the copy: of a quantized linear layer nothing can be trained."""
    saved = (run.plan["peft"] or {}).get("modules_to_save") or []
    if not _bits(run) or run.base.modules is None:
        return
    kept = (run.plan["quantization"] or {}).get("llm_int8_skip_modules") or ["lm_head"]
    linears = {m.rsplit(".", 1)[-1] for m in run.base.modules} - {*INPUT_EMBEDDINGS, "wpe", "embed_positions", *kept}
    for name in sorted(linears.intersection(saved)):
        yield (
            f"{name} is quantized, so it cannot be trained whole",
            "peft.modules_to_save",
            f"make it a target of LoRA, or keep it: quantization.llm_int8_skip_modules=[lm_head,{name}]",
        )


def lora_bias(run: RuleContext) -> Violations:
    if _bits(run) and (run.plan["peft"] or {}).get("lora_bias"):
        yield (
            "PEFT's own safe_merge fails with lora_bias over a quantized base",
            "peft.lora_bias",
            "merge with kit merge, which computes it",
        )


def int8_sharded(run: RuleContext) -> Violations:
    if _bits(run) != 8:
        return
    key = "quantization.load_in_8bit"
    if run.zero_stage == 3:
        yield (
            "an int8 base cannot be sharded by ZeRO-3, which gathers weights of one float dtype",
            key,
            "deepspeed=zero2, or quantization=nf4",
        )
    if run.plan["fsdp"]:
        yield "an int8 base cannot be sharded by FSDP", key, "quantization=nf4, or fsdp=none deepspeed=zero2"


def int8_main_weights(run: RuleContext) -> Violations:
    if _bits(run) == 8 and (run.plan["quantization"] or {}).get("llm_int8_has_fp16_weight"):
        yield (
            "llm_int8_has_fp16_weight keeps 16-bit weights and quantizes them in every step: nothing is saved",
            "quantization.llm_int8_has_fp16_weight",
            "remove it, or quantization=none",
        )


def storage_dtype(run: RuleContext) -> Violations:
    """DeepSpeed casts every float parameter of another dtype, packed 4-bit data too: numbers instead of bits."""
    if _bits(run) != 4:
        return
    storage, key = _storage(run), "quantization.bnb_4bit_quant_storage"
    if run.zero_stage == 3 and storage != run.precision:
        yield (
            f"under ZeRO-3 the 4-bit storage dtype ({storage}) must be the training precision",
            key,
            f"{key}={run.precision}",
        )
    elif run.plan["fsdp"] and storage != run.precision:
        yield f"under FSDP the 4-bit storage dtype ({storage}) must be the training precision", key, f"{key}=auto"
    elif run.plan["deepspeed"] and storage not in ("uint8", run.precision):
        yield (
            f"DeepSpeed would convert the packed 4-bit data from {storage} to {run.precision} and destroy it",
            key,
            f"{key}=uint8",
        )


def cpu_offload(run: RuleContext) -> Violations:
    if (run.plan["quantization"] or {}).get("llm_int8_enable_fp32_cpu_offload"):
        yield (
            "llm_int8_enable_fp32_cpu_offload leaves layers on the CPU for inference; training has no use of them",
            "quantization.llm_int8_enable_fp32_cpu_offload",
            "remove it; deepspeed=zero2_offload moves the optimizer to the CPU",
        )


def offload_param(run: RuleContext) -> Violations:
    device = value_at(run.plan["deepspeed"], "zero_optimization.offload_param.device")
    if _bits(run) and device not in (None, "none"):
        yield (
            "offload_param with a quantized base takes more GPU memory than leaving it there",
            "deepspeed.zero_optimization.offload_param.device",
            "deepspeed=zero3, or quantization=none",
        )


def stored_quantized(run: RuleContext) -> Violations:
    stored = (run.base.config or {}).get("quantization_config")
    if run.plan["quantization"] and stored:
        kind = stored.get("quant_method", "quantized") if isinstance(stored, dict) else "quantized"
        yield (
            f"{run.plan['model']['name_or_path']} is stored quantized already ({kind}, in its config.json)",
            "quantization",
            "give the original model, whose weights are floats",
        )


def nothing_to_quantize(run: RuleContext) -> Violations:
    if run.plan["quantization"] and run.plan["model"]["random_init"]:
        yield "random_init has no weights to quantize", "model.random_init", "quantization=none"


def given_to_the_model(run: RuleContext) -> Violations:
    if "quantization_config" in (run.plan["trainer"].get("model_init_kwargs") or {}):
        key = "trainer.model_init_kwargs.quantization_config"
        yield "quantization is not set here", key, "quantization=nf4 or quantization=int8"


def bitsandbytes_missing(run: RuleContext) -> Violations:
    if _bits(run) and find_spec("bitsandbytes") is None:
        yield "bitsandbytes is not installed", "quantization", "pip install bitsandbytes"
