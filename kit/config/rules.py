"""The rules between keys: what each refuses or warns of, the fix, and where the knowledge comes from.

A rule is a function of the resolved facts that yields nothing where all is well. `here` rules ask about this machine
and hold only where the run is about to start on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kit.config import architectures, trackers
from kit.config import rules_quantization as quantized
from kit.errors import Problem
from kit.hardware import Gpu


@dataclass
class Facts:
    """Everything that the rules may look at."""

    plan: dict[str, Any]  # the resolved tree: model, dataset, peft, quantization, deepspeed, fsdp, trainer, launch
    set_by: Callable[[str], str]  # dotted key -> where it was set
    world_size: int
    stage: int
    precision: str
    modules: list[str] | None  # names of the base's 2-D weights, None where they cannot be known
    columns_format: str | None  # messages | prompt_completion | text, None where the data is not here
    gpus: tuple[Gpu, ...] = ()
    on_cpu: bool = False
    config: dict[str, Any] = field(default_factory=dict)  # of the base, empty where it cannot be known
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Rule:
    id: str
    source: str
    check: Callable[[Facts], Iterator[tuple[str, str, str]]]  # (problem, key, fix)
    severity: str = "refuse"
    here: bool = False


def fsdp_and_deepspeed(f: Facts) -> Iterator[tuple[str, str, str]]:
    if f.plan["fsdp"] and f.plan["deepspeed"]:
        yield "deepspeed and fsdp are both chosen; they shard the same weights", "fsdp", "fsdp=none or deepspeed=none"


def fsdp_on_cpu(f: Facts) -> Iterator[tuple[str, str, str]]:
    if f.plan["fsdp"] and f.on_cpu:
        yield (
            "accelerate applies FSDP on GPUs only: on a CPU it is silently left out",
            "fsdp",
            "fsdp=none deepspeed=zero3",
        )


def fp16_and_bf16(f: Facts) -> Iterator[tuple[str, str, str]]:
    if f.plan["trainer"].get("fp16") is True and f.plan["trainer"].get("bf16") is True:
        yield "fp16 and bf16 are both true", "trainer.fp16", "keep one: trainer.fp16=false or trainer.bf16=false"


def fp16_on_cpu(f: Facts) -> Iterator[tuple[str, str, str]]:
    if f.on_cpu and f.precision == "float16":
        yield "fp16 training needs a GPU: CPUs have no float16 gradient scaling", "trainer.fp16", "trainer.fp16=false"


def bf16_lacking(f: Facts) -> Iterator[tuple[str, str, str]]:
    old = [g for g in f.gpus if g.capability and g.capability < (8, 0)]
    if f.precision == "bfloat16" and not f.on_cpu and old:
        yield f"{old[0].name} has no bfloat16", "trainer.bf16", "trainer.bf16=false trainer.fp16=true"


def bf16_slow_cpu(f: Facts) -> Iterator[tuple[str, str, str]]:
    from kit import hardware

    if f.on_cpu and f.precision == "bfloat16" and not hardware.cpu_multiplies_bf16():
        yield (
            "this CPU has no bfloat16 instructions: 25-50 times slower than float32",
            "trainer.bf16",
            "trainer.bf16=false",
        )


def gpus_missing(f: Facts) -> Iterator[tuple[str, str, str]]:
    wanted = f.plan["launch"]["num_gpus"]
    if not f.on_cpu and wanted > len(f.gpus):
        yield (
            f"{wanted} GPU{'s' * (wanted != 1)} asked for, this machine shows {len(f.gpus)}",
            "launch.num_gpus",
            f"launch.num_gpus={len(f.gpus)}" if f.gpus else "run it where the GPUs are, or trainer.use_cpu=true",
        )


def one_process_local(f: Facts) -> Iterator[tuple[str, str, str]]:
    if f.plan["launch"]["launcher"] == "local" and f.plan["launch"]["num_gpus"] > 1:
        yield (
            "launch=local starts one process",
            "launch.num_gpus",
            "launch=deepspeed, launch=torchrun or launch.num_gpus=1",
        )


def lm_head_target(f: Facts) -> Iterator[tuple[str, str, str]]:
    targets = (f.plan["peft"] or {}).get("target_modules")
    named = [targets] if isinstance(targets, str) else targets or []
    if any(t == "lm_head" or str(t).endswith(".lm_head") for t in named):
        yield (
            "lm_head cannot be a LoRA target: the trainer's fused loss reads its weight directly",
            "peft.target_modules",
            "drop it, or train it whole: peft.modules_to_save=[lm_head]",
        )


def targets_match_nothing(f: Facts) -> Iterator[tuple[str, str, str]]:
    targets = (f.plan["peft"] or {}).get("target_modules")
    if not targets or targets == "all-linear" or f.modules is None:
        return
    if isinstance(targets, str):
        try:
            matched = [m for m in f.modules if re.fullmatch(targets, m)]
        except re.error as error:
            yield (
                f"target_modules is no regular expression: {error}",
                "peft.target_modules",
                "list names, or all-linear",
            )
            return
        dead = [] if matched else [targets]
    else:
        dead = [t for t in targets if not any(m == t or m.endswith(f".{t}") for m in f.modules)]
    if dead:
        last = sorted({m.rsplit(".", 1)[-1] for m in f.modules if not m.endswith(("lm_head", "norm"))})
        fused = f.config.get("model_type") in architectures.FUSED_EXPERTS
        why = ": its experts are fused 3-D parameters, LoRA reaches the attention only" if fused else ""
        yield (
            f"no module of the base is named {', '.join(map(str, dead))}{why}",
            "peft.target_modules",
            f"all-linear, or some of {', '.join(last)}",
        )


def trust_remote_code(f: Facts) -> Iterator[tuple[str, str, str]]:
    for key, value in (("model.trust_remote_code", f.plan["model"]["trust_remote_code"]),
                       ("trainer.trust_remote_code", f.plan["trainer"].get("trust_remote_code"))):  # fmt: skip
        if value and not f.set_by(key).startswith("command line"):
            yield "a file must not switch on remote code", key, f"say it yourself, on the command line: {key}=true"


def best_model(f: Facts) -> Iterator[tuple[str, str, str]]:
    t = f.plan["trainer"]
    if not t.get("load_best_model_at_end"):
        return
    if t.get("eval_strategy", "no") != t.get("save_strategy", "steps") and t.get("save_strategy") != "best":
        yield (
            f"load_best_model_at_end needs eval_strategy ({t.get('eval_strategy', 'no')}) and save_strategy "
            f"({t.get('save_strategy', 'steps')}) to agree",
            "trainer.load_best_model_at_end",
            f"trainer.eval_strategy={t.get('save_strategy', 'steps')}",
        )
    if t.get("save_only_model") and f.plan["deepspeed"]:
        yield (
            "save_only_model with load_best_model_at_end does not work under DeepSpeed",
            "trainer.save_only_model",
            "trainer.save_only_model=false",
        )


def eval_without_data(f: Facts) -> Iterator[tuple[str, str, str]]:
    d = f.plan["dataset"]
    if f.plan["trainer"].get("eval_strategy", "no") != "no" and not (
        d["eval_path"] or d["eval_split"] or d["test_size"]
    ):
        yield "evaluation is on, but there is no held-out data", "trainer.eval_strategy", "dataset.test_size=0.1"


def find_batch_size(f: Facts) -> Iterator[tuple[str, str, str]]:
    if f.plan["trainer"].get("auto_find_batch_size") and f.plan["deepspeed"]:
        yield (
            "auto_find_batch_size cannot restart a DeepSpeed engine",
            "trainer.auto_find_batch_size",
            "set trainer.per_device_train_batch_size",
        )


def packing_wrapped(f: Facts) -> Iterator[tuple[str, str, str]]:
    if f.plan["trainer"].get("packing") and f.plan["trainer"].get("packing_strategy") == "wrapped":
        yield (
            "packing_strategy=wrapped lets documents attend to each other",
            "trainer.packing_strategy",
            "trainer.packing_strategy=bfd",
        )


def assistant_loss_needs_chat(f: Facts) -> Iterator[tuple[str, str, str]]:
    t = f.plan["trainer"]
    if t.get("assistant_only_loss") and f.columns_format not in (None, "messages"):
        yield (
            f"assistant_only_loss needs chat data, this is {f.columns_format}",
            "trainer.assistant_only_loss",
            "trainer.assistant_only_loss=false",
        )
    if t.get("completion_only_loss") and f.columns_format not in (None, "prompt_completion"):
        yield (
            f"completion_only_loss needs prompt and completion, this is {f.columns_format}",
            "trainer.completion_only_loss",
            "trainer.completion_only_loss=null",
        )


def device_map(f: Facts) -> Iterator[tuple[str, str, str]]:
    if (f.plan["trainer"].get("model_init_kwargs") or {}).get("device_map") is not None:
        yield (
            "device_map places layers for inference; training places the model itself",
            "trainer.model_init_kwargs.device_map",
            "remove it",
        )


def token_indices_on_cpu(f: Facts) -> Iterator[tuple[str, str, str]]:
    if f.stage == 3 and f.on_cpu and (f.plan["peft"] or {}).get("trainable_token_indices"):
        yield (
            "PEFT gathers trainable_token_indices under ZeRO-3 on CUDA only",
            "peft.trainable_token_indices",
            "deepspeed=zero2",
        )


RULES = [
    Rule("deepspeed-fsdp", "T18", fsdp_and_deepspeed),
    Rule("fsdp-cpu", "T88", fsdp_on_cpu),
    Rule("fp16-bf16", "T8", fp16_and_bf16),
    Rule("fp16-cpu", "T72", fp16_on_cpu),
    Rule("bf16-hardware", "T72", bf16_lacking, here=True),
    Rule("bf16-slow-cpu", "T83", bf16_slow_cpu, severity="warn", here=True),
    Rule("gpus-missing", "T69", gpus_missing, here=True),
    Rule("local-one-process", "T66", one_process_local),
    Rule("lm-head-target", "T38", lm_head_target),
    Rule("targets-match", "reliability 37", targets_match_nothing),
    Rule("remote-code", "security", trust_remote_code),
    Rule("best-model", "T17", best_model),
    Rule("eval-data", "transformers Trainer.__init__", eval_without_data),
    Rule("find-batch-size", "T17", find_batch_size),
    Rule("packing-wrapped", "T60", packing_wrapped),
    Rule("loss-mask-format", "T63", assistant_loss_needs_chat),
    Rule("quantized-bits", "transformers BitsAndBytesConfig", quantized.bits),
    Rule("quantized-defaults", "T45", quantized.unsaid_defaults, severity="warn"),
    Rule("quantized-full", "transformers Trainer.__init__", quantized.full_fine_tuning),
    Rule("quantized-peft", "peft 0.21, tried", quantized.peft_method),
    Rule("quantized-saved-module", "peft 0.21, tried", quantized.trained_whole),
    Rule("quantized-lora-bias", "T50", quantized.lora_bias, severity="warn"),
    Rule("quantized-int8-sharded", "T43 T46", quantized.int8_sharded),
    Rule("quantized-int8-main", "transformers BitsAndBytesConfig", quantized.int8_main_weights),
    Rule("quantized-storage", "T42 T46", quantized.storage_dtype),
    Rule("quantized-cpu-offload", "transformers BitsAndBytesConfig", quantized.cpu_offload),
    Rule("quantized-offload-param", "T44", quantized.offload_param, severity="warn"),
    Rule("quantized-stored", "DeepSpeed#7096", quantized.stored_quantized),
    Rule("quantized-random", "kit/training/model.py", quantized.nothing_to_quantize),
    Rule("quantized-init-kwargs", "kit/training/model.py", quantized.given_to_the_model),
    Rule("bitsandbytes", "transformers", quantized.bitsandbytes_missing, here=True),
    Rule("device-map", "T22", device_map),
    Rule("tracker-all", "transformers integration_utils", trackers.whatever_is_installed),
    Rule("tracker-missing", "transformers integration_utils", trackers.missing, here=True),
    Rule("tracker-online", "security", trackers.online, severity="warn"),
    Rule("token-indices-zero3", "T37", token_indices_on_cpu),
]


def apply(facts: Facts, here: bool) -> tuple[list[Problem], list[Problem]]:
    """All refusals and all warnings of the table."""
    refused: list[Problem] = []
    warned: list[Problem] = []
    for rule in RULES:
        if rule.here and not here:
            continue
        for problem, key, fix in rule.check(facts):
            found = Problem(problem, facts.set_by(key), fix, rule.id)
            (refused if rule.severity == "refuse" else warned).append(found)
    return refused, warned
