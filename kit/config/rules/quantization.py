"""The rules of a quantized base: what bitsandbytes, PEFT, DeepSpeed and FSDP cannot do together.

All of them hold before a weight is loaded; kit/config/rules/table.py lists them.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

from kit.config.rules.context import RuleContext, Violations
from kit.inspection.architectures import INPUT_EMBEDDINGS
from kit.schema.dotted import value_at

# Methods that compute with the stored weight itself, as if it were a matrix of floats: tried with peft 0.21, each
# fails in its first step or before. The second list works over int8, whose rows are still rows.
NOT_OVER_BNB = {"DELORA", "FROD", "GLORA", "PSOFT", "SUPERTUNING", "TINYLORA"}
NOT_OVER_4BIT = {"DEFT", "HRA", "LOHA", "LOKR", "PEANUT"}
NEEDS_FLOATS = ("pissa", "loftq", "orthogonal", "olora", "mica")  # init_lora_weights that decompose the weight

# Bases that are stored quantized, by quant_method of their config.json: whether transformers trains adapters over
# them (`is_trainable` of its quantizers/, which Trainer.__init__ asks after loading), and the package that loads them.
# Compared with transformers by tests/config/test_stored_quantized.py.
NOT_TRAINED = (
    "auto-round",
    "fbgemm_fp8",
    "gemma",
    "gguf",
    "higgs",
    "metal",
    "mxfp4",
    "nvfp4",
    "quark",
    "spqr",
    "vptq",
)
TRAINED_WHERE = {  # a value of quantization_config -> what it must be
    "fp_quant": ("store_master_weights", True), "fouroversix": ("keep_master_weights", True),
    "bitnet": ("quantization_mode", "online"),
}  # fmt: skip
PACKAGES = {"awq": "gptqmodel", "gptq": "gptqmodel", "aqlm": "aqlm", "eetq": "eetq", "hqq": "hqq", "quanto": "optimum",
            "compressed-tensors": "compressed_tensors", "torchao": "torchao", "bitsandbytes": "bitsandbytes",
            "fp_quant": "fp_quant", "sinq": "sinq"}  # fmt: skip
FLOAT_COPY = "give a copy of the model whose weights are floats"


def stored(run: RuleContext) -> dict[str, Any]:
    """quantization_config of the base's config.json; empty where its weights are floats, or drawn."""
    given = (run.base.config or {}).get("quantization_config") or run.base.text.get("quantization_config")
    if not given or run.plan["model"]["random_init"]:
        return {}
    return given if isinstance(given, dict) else {"quant_method": "unknown"}


def stored_method(run: RuleContext) -> str:
    """The quant_method of a base that is stored quantized; empty where it is not."""
    given = stored(run)
    by_bits = "bitsandbytes" if given.get("load_in_4bit") or given.get("load_in_8bit") else "unknown"
    return str(given.get("quant_method") or by_bits) if given else ""


def _quantization(run: RuleContext) -> dict[str, Any]:
    """What bitsandbytes is told: the run's section, or what a base stored by it brings."""
    return run.plan["quantization"] or (stored(run) if stored_method(run) == "bitsandbytes" else {})


def _bits(run: RuleContext) -> int | None:
    q = _quantization(run)
    return 4 if q.get("load_in_4bit") else 8 if q.get("load_in_8bit") else None


def _storage(run: RuleContext) -> str:
    return _quantization(run).get("bnb_4bit_quant_storage") or "uint8"


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
        key, floats = ("quantization", "quantization=none") if run.plan["quantization"] else ("peft", FLOAT_COPY)
        yield "a quantized base cannot be fully fine-tuned", key, f"peft=lora, or {floats}"


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
    kept = _quantization(run).get("llm_int8_skip_modules") or ["lm_head"]
    linears = {m.rsplit(".", 1)[-1] for m in run.base.modules} - {*INPUT_EMBEDDINGS, "wpe", "embed_positions", *kept}
    for name in sorted(linears.intersection(saved)):
        yield (
            f"{name} is quantized, so it cannot be trained whole",
            "peft.modules_to_save",
            f"make it a target of LoRA, or keep it: quantization.llm_int8_skip_modules=[lm_head,{name}]",
        )


def quantized_head(run: RuleContext) -> Violations:
    """A list of llm_int8_skip_modules takes the place of transformers' own, which keeps the head."""
    kept, key = (run.plan["quantization"] or {}).get("llm_int8_skip_modules"), "quantization.llm_int8_skip_modules"
    if _bits(run) and kept is not None and "lm_head" not in kept:
        yield (
            "without lm_head in it the head is quantized too, and TRL's fused loss multiplies with its weight",
            key,
            f"{key}=[{','.join(['lm_head', *map(str, kept)])}]",
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
    if run.plan["quantization"] and (method := stored_method(run)):
        name = run.plan["model"]["name_or_path"]
        yield (
            f"{name} is stored quantized already ({method}, in its config.json)",
            "quantization",
            "quantization=none, or give the original model, whose weights are floats",
        )


def stored_untrainable(run: RuleContext) -> Violations:
    """What transformers, PEFT, ZeRO-3 and FSDP cannot do over a base that is stored quantized, but not by bnb."""
    method, peft = stored_method(run), run.plan["peft"]
    if method in ("", "bitsandbytes"):
        return
    key, name = "model.name_or_path", run.plan["model"]["name_or_path"]
    what = f"{name} is stored quantized ({method}, in its config.json)"
    wanted = TRAINED_WHERE.get(method)
    if method in NOT_TRAINED or (wanted and stored(run).get(wanted[0]) != wanted[1]):
        yield f"{what}, over which transformers trains nothing", key, FLOAT_COPY
        return
    if method == "torchao" and not _eight_bits(stored(run)):
        yield f"{what}, and transformers trains over torchao's 8-bit weights alone", key, FLOAT_COPY
        return
    if not peft:
        yield f"{what}, so its weights cannot be fine-tuned", key, f"peft=lora, or {FLOAT_COPY}"
        return
    kind, init = str(peft.get("peft_type")).upper(), peft.get("init_lora_weights")
    if kind != "LORA":
        yield f"{what}: PEFT's layers for it are LoRA's", "peft.peft_type", f"peft.peft_type=LORA, or {FLOAT_COPY}"
    if isinstance(init, str) and init.startswith(NEEDS_FLOATS):
        text = f"{what}, and init_lora_weights={init} decomposes float weights"
        yield text, "peft.init_lora_weights", f"peft.init_lora_weights=true, or {FLOAT_COPY}"
    if peft.get("use_dora"):
        yield f"{what}, and DoRA needs the norms of float weights", "peft.use_dora", "peft.use_dora=false"
    if run.zero_stage == 3:
        yield f"{what}: ZeRO-3 gathers weights of one float dtype", "deepspeed", f"deepspeed=zero2, or {FLOAT_COPY}"
    if run.plan["fsdp"]:
        yield f"{what}: FSDP shards weights of one float dtype", "fsdp", f"deepspeed=zero2, or {FLOAT_COPY}"


def _eight_bits(config: dict[str, Any]) -> bool:
    """Whether a torchao scheme is one of 8 bits: the first number in its name, as transformers reads it."""
    scheme = config.get("quant_type")
    while isinstance(scheme, dict) and scheme:
        scheme = scheme.get("_type") or next(iter(scheme.values()))
    number = re.search(r"\d+", str(scheme))
    return number is not None and number[0] == "8"


def stored_package(run: RuleContext) -> Violations:
    package = PACKAGES.get(stored_method(run))
    if package and package != "bitsandbytes" and find_spec(package) is None:
        text = f"the base is stored quantized ({stored_method(run)}), and {package} is not installed"
        yield text, "model.name_or_path", f"pip install {package.replace('_', '-')}, or {FLOAT_COPY}"


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
