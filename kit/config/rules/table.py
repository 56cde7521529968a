"""The one table of rules: everything that `kit check` refuses or warns of, and where the knowledge comes from.

A rule with a check is a function of the resolved facts that yields nothing where all is well; `here` rules ask about
this machine and hold only where the run is about to start on it. A rule without one is made while the configuration
is read, by the module that stands as its maker. What each rule is about is told in stories.yaml (explain.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from kit.config import slurm
from kit.config.rules import launch as launch
from kit.config.rules import model as model
from kit.config.rules import quantization as quantized
from kit.config.rules import tracking as tracking
from kit.config.rules import trainer as trainer
from kit.errors import Problem
from kit.schema import trackers
from kit.system.hardware import Gpu


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
    tied: bool | None = None  # one matrix at both ends of the base; None where it cannot be known
    base_bytes: int | None = None  # of the base's weights as they are stored; None where they are not here
    base_numbers: int | None = None
    chosen: Callable[[str], bool] = lambda key: False  # dotted key -> whether a person set it, not the kit's groups
    here: bool = False  # the run is about to start on this machine

    @property
    def surely_on_cpu(self) -> bool:
        """Not only because the machine that looks at the run has no GPU."""
        return self.on_cpu and (self.here or self.chosen("trainer.use_cpu"))


Check = Callable[[Facts], Iterator[tuple[str, str, str]]]  # (problem, key, fix)


@dataclass(frozen=True)
class Rule:
    """`source`: a trap of tests/config/coverage.yaml, or the library that says so. `keys`: what the rule reads."""

    id: str
    source: str
    keys: tuple[str, ...]
    check: Check | None = None
    severity: Literal["refuse", "warn"] = "refuse"
    here: bool = False
    maker: str = ""  # of a rule without a check: the module that finds it

    @property
    def story(self) -> str:
        """What the libraries do by themselves, why it hurts, and what to do; read from stories.yaml when asked for."""
        from kit.config.rules import explain

        return explain.stories()[self.id]["story"]


def read_by(maker: str, id: str, source: str, *keys: str) -> Rule:
    return Rule(id, source, keys, maker=maker)


Z = "deepspeed.zero_optimization"
READING = [
    read_by("compose", "override", "hydra override grammar"),
    read_by("compose", "group-choice", "hydra, T86"),
    read_by("compose", "run-file", "T80"),
    read_by("compose", "environment-variable", "fault 23"),
    read_by("read", "missing", "T79"),
    read_by("read", "unknown-key", "T4 T62, fault 20"),
    read_by("fields", "renamed-key", "T12 T15 T62"),
    read_by("fields", "removed-key", "T12"),
    read_by("fields", "missing-key", "the libraries' own classes"),
    read_by("fields", "kind", "T79 T80"),
    read_by("fields", "range", "T14 T18"),
    read_by("fields", "choice", "the libraries' own classes"),
    read_by("zero_check", "auto", "T3", "deepspeed"),
    read_by("deepspeed_file", "doubled", "json, RFC 8259", "deepspeed"),
    Rule("literal", "T1 T5", ("deepspeed.train_batch_size",), severity="warn", maker="deepspeed_file"),
    read_by("read", "type", "kit/schema/run_plan.py"),
    read_by("read", "section", "T79", "peft", "quantization", "deepspeed"),
    read_by("read", "owned", "T76 T79, security", "trainer.output_dir", "trainer.deepspeed", "trainer.fsdp",
            "trainer.hub_token", "trainer.eos_token", "trainer.pad_token", "trainer.chat_template_path"),
    read_by("read", "path", "T80", "model.name_or_path", "tokenizer.name_or_path", "dataset.path", "runs_dir"),
    read_by("read", "script", "T80", "launch.script"),
    read_by("read", "count", "T69", "launch.num_gpus", "launch.num_nodes"),
    read_by("nodes", "hostfile", "T69, deepspeed runner", "launch.hostfile", "launch.include", "launch.exclude",
            "launch.num_nodes", "launch.num_gpus"),
    read_by("resolve", "batch", "T5", "global_batch_size", "trainer.per_device_train_batch_size",
            "trainer.gradient_accumulation_steps", "launch.num_gpus"),
    read_by("read", "peft-none", "kit/schema/run_plan.py", "peft"),
    read_by("read", "peft-type", "peft PEFT_TYPE_TO_CONFIG_MAPPING", "peft.peft_type"),
    read_by("dataset", "dataset-files", "fault 31", "dataset.path", "dataset.eval_path"),
    read_by("dataset", "dataset-rows", "fault 24", "dataset.path", "dataset.eval_path"),
    read_by("dataset", "dataset-unreadable", "fault 31", "dataset.path", "dataset.eval_path"),
    read_by("dataset", "dataset-columns", "fault 30", "dataset.columns", "dataset.path"),
    read_by("dataset", "dataset-format", "fault 30", "dataset.format", "dataset.columns"),
    read_by("template", "dataset-template", "fault 30", "dataset.template", "dataset.columns"),
    read_by("hub_dataset", "dataset-configuration", "datasets", "dataset.name"),
    read_by("read", "dataset-split", "datasets", "dataset.split", "dataset.eval_split", "dataset.path"),
    read_by("read", "held-out", "datasets train_test_split", "dataset.test_size", "dataset.validation_size"),
    read_by("model", "model-folder", "T40", "model.name_or_path"),
    read_by("model", "model-files", "T25, security", "model.name_or_path"),
    read_by("model", "hub", "huggingface_hub", "model.name_or_path", "model.revision"),
    read_by("model", "offline", "T39", "model.name_or_path", "tokenizer.name_or_path", "dataset.path"),
    read_by("architectures", "architecture", "transformers' models", "model.name_or_path", "model.config.model_type"),
    read_by("tokenizer", "tokenizer-files", "fault 34", "tokenizer.name_or_path"),
    read_by("tokenizer", "chat-template", "T93, fault 34", "tokenizer.chat_template", "dataset.format"),
    read_by("tokenizer", "chat-template-name", "T93", "tokenizer.chat_template"),
    read_by("tokenizer", "generation-marks", "T63", "trainer.assistant_only_loss", "tokenizer.chat_template"),
    read_by("tokenizer", "special-token", "fault 34", "tokenizer.pad_token", "tokenizer.eos_token",
            "tokenizer.bos_token"),
    read_by("tokenizer", "special-token-missing", "fault 34", "tokenizer.pad_token", "tokenizer.eos_token"),
    read_by("tokenizer", "vocabulary", "fault 35", "tokenizer.name_or_path", "tokenizer.added_tokens"),
    read_by("embeddings", "added-tokens", "T26 T33 T65", "tokenizer.added_tokens", "peft.modules_to_save",
            "peft.target_modules", "peft.trainable_token_indices"),
    read_by("embeddings", "token-indices-tied", "T51 T65", "peft.trainable_token_indices"),
    read_by("init_from", "init-from", "T57, fault 36", "peft.init_from", "peft.init_from_pickle"),
    read_by("init_from", "init-from-files", "fault 36, security", "peft.init_from"),
    read_by("init_from", "init-from-base", "fault 36", "peft.init_from", "model.name_or_path"),
    read_by("zero", "deepspeed-file", "T4", "deepspeed.file"),
    read_by("zero", "zero-block", "T4 T12", Z),
    read_by("zero", "deepspeed", "T11 T18", "deepspeed"),
    read_by("zero", "mismatch", "T1 T5 T8", "deepspeed", "trainer"),
    read_by("zero", "hidden-size", "T2 T3 T16", f"{Z}.reduce_bucket_size", f"{Z}.stage3_prefetch_bucket_size",
            f"{Z}.stage3_param_persistence_threshold", "model.config.hidden_size"),
    read_by("zero", "optimizer", "T9", "deepspeed.optimizer", "trainer.optim"),
    read_by("zero", "offload-optimizer", "T10", f"{Z}.offload_optimizer.device", "trainer.optim",
            "deepspeed.zero_force_ds_cpu_optimizer"),
    read_by("zero", "scheduler", "T14", "deepspeed.scheduler", "trainer.max_steps", "trainer.warmup_steps"),
]  # fmt: skip

T, P, Q = "trainer", "peft", "quantization"
SIZES = (f"{T}.per_device_eval_batch_size", f"{T}.per_device_train_batch_size", f"{T}.eval_strategy")
WARMUP = (f"{T}.warmup_steps", f"{T}.max_steps", f"{T}.lr_scheduler_type")
LENGTH = (f"{T}.max_length", "model.config.max_position_embeddings", "model.config.n_positions")
CHECKPOINTING = (f"{T}.gradient_checkpointing", f"{T}.gradient_checkpointing_kwargs", f"{T}.activation_checkpointing",
                 f"{T}.activation_checkpointing_kwargs")  # fmt: skip
BITS = (f"{Q}.load_in_4bit", f"{Q}.load_in_8bit")
CHECKS = [
    Rule("deepspeed-fsdp", "T18", ("deepspeed", "fsdp"), launch.fsdp_and_deepspeed),
    Rule("fsdp-cpu", "T88", ("fsdp", f"{T}.use_cpu"), launch.fsdp_on_cpu),
    Rule("fsdp-alone", "transformers Trainer.__init__", ("fsdp", "launch.num_gpus"), launch.fsdp_alone),
    Rule("fsdp-checkpointing", "transformers Trainer", ("fsdp.activation_checkpointing", *CHECKPOINTING[::2]),
         launch.fsdp_checkpointing),
    Rule("fp16-bf16", "T8", (f"{T}.fp16", f"{T}.bf16"), launch.fp16_and_bf16),
    Rule("full-eval", "transformers TrainingArguments", (f"{T}.fp16_full_eval", f"{T}.bf16_full_eval"),
         launch.full_eval),
    Rule("fp16-cpu", "T72", (f"{T}.fp16", f"{T}.use_cpu"), launch.fp16_on_cpu),
    Rule("ddp-backend", "T82", (f"{T}.ddp_backend", f"{T}.use_cpu", "launch.num_gpus"), launch.ddp_backend),
    Rule("tf32-cpu", "transformers TrainingArguments", (f"{T}.tf32", f"{T}.use_cpu"), launch.tf32_on_cpu),
    Rule("bf16-hardware", "T72, fault 22", (f"{T}.bf16",), launch.bf16_lacking, here=True),
    Rule("bf16-slow-cpu", "T83", (f"{T}.bf16", f"{T}.use_cpu"), launch.bf16_slow_cpu, "warn", here=True),
    Rule("gpus-missing", "T69", ("launch.num_gpus",), launch.gpus_missing, here=True),
    Rule("local-one-process", "T66", ("launch.launcher", "launch.num_gpus", "launch.num_nodes"),
         launch.one_process_local),
    Rule("hostfile-unread", "torchrun", ("launch.launcher", "launch.hostfile", "launch.include", "launch.exclude"),
         launch.hostfile_unread),
    Rule("node-rank", "deepspeed runner", ("launch.node_rank", "launch.num_nodes", "launch.hostfile", "launch.no_ssh",
         "launch.slurm"), launch.node_rank),
    Rule("port-taken", "T70", ("launch.master_port",), launch.port_taken, here=True),
    Rule("host-memory", "T24", (f"{Z}.stage", "model.name_or_path"), launch.host_memory, here=True),
    Rule("quantized-gpu-memory", "T41", (*BITS, "model.name_or_path"), launch.quantized_gpu_memory, here=True),
    Rule("token-indices-zero3", "T37", ("peft.trainable_token_indices", f"{Z}.stage"), launch.token_indices_on_cpu),
    Rule("slurm-value", "security rule 8", tuple(f"launch.slurm.{k}" for k in (*slurm.PATTERNS, "modules", "setup")),
         launch.slurm_values),
    Rule("slurm-extra", "security rule 8", ("launch.slurm.extra",), launch.slurm_extra),
    Rule("slurm-gpus", "T69", ("launch.slurm.gres", "launch.num_gpus"), launch.slurm_gpus),
    # the base model
    Rule("length-learned", "transformers GPT-2, OPT", LENGTH, model.length_learned),
    Rule("length-uncut", "transformers GPT-2, OPT", LENGTH, model.length_uncut, "warn"),
    Rule("length-range", "transformers modeling_rope_utils", LENGTH, model.length_range, "warn"),
    Rule("moe-leaf", "T27", (f"{Z}.leaf_module", f"{Z}.stage", "model.config.num_experts"), model.moe_leaf, "warn"),
    Rule("autotp-experts", "T24", ("deepspeed.tensor_parallel.autotp_size",), model.autotp_experts),
    Rule("autotp-heads", "deepspeed engine", ("deepspeed.tensor_parallel.autotp_size",), model.autotp_heads, "warn"),
    Rule("attention-name", "transformers AttentionInterface", ("model.attn_implementation",), model.attention_name),
    Rule("attention-precision", "flash-attn", ("model.attn_implementation", f"{T}.bf16"), model.attention_precision),
    Rule("packing-recurrent", "T60", (f"{T}.packing", f"{T}.padding_free"), model.packing_recurrent, "warn"),
    # the adapter against the base
    Rule("lm-head-target", "T38", ("peft.target_modules",), model.lm_head_target),
    Rule("targets-match", "fault 37", ("peft.target_modules",), model.targets_match_nothing),
    Rule("patterns-match", "T52", ("peft.rank_pattern", "peft.alpha_pattern"), model.patterns_match_nothing),
    Rule("saved-match", "peft 0.21, tried", ("peft.modules_to_save",), model.saved_match_nothing),
    Rule("loftq-packages", "peft LoraConfig", ("peft.init_lora_weights",), model.loftq_packages, here=True),
    Rule("layers-range", "peft 0.21, tried",
         ("peft.layers_to_transform", "peft.layers_pattern", "peft.target_modules"), model.layers_range),
    Rule("tied-target", "T51", ("peft.target_modules",), model.tied_target, "warn"),
    Rule("tied-saved", "T51", ("peft.modules_to_save", "peft.ensure_weight_tying"), model.tied_saved, "warn"),
    Rule("prefix-checkpointing", "peft PeftModel", ("peft.peft_type", *CHECKPOINTING[::2]),
         model.prefix_checkpointing),
    # the trainer
    Rule("remote-code", "security", ("model.trust_remote_code", f"{T}.trust_remote_code"), trainer.trust_remote_code),
    Rule("best-model", "T17", (f"{T}.load_best_model_at_end", f"{T}.eval_strategy", f"{T}.save_strategy",
                               f"{T}.save_only_model"), trainer.best_model),
    Rule("best-steps", "transformers TrainingArguments", (f"{T}.load_best_model_at_end", f"{T}.save_steps",
                                                          f"{T}.eval_steps"), trainer.best_steps),
    Rule("best-metric", "transformers Trainer.__init__", (f"{T}.save_strategy", f"{T}.metric_for_best_model"),
         trainer.best_metric),
    Rule("eval-data", "transformers Trainer.__init__", (f"{T}.eval_strategy", "dataset.test_size",
                                                        "dataset.eval_path"), trainer.eval_without_data),
    Rule("eval-never", "transformers Trainer", (f"{T}.eval_steps", f"{T}.max_steps"), trainer.eval_never, "warn"),
    Rule("eval-batch", "source fault n", SIZES, trainer.eval_batch, "warn"),
    Rule("eval-schedule", "transformers TrainingArguments", (f"{T}.lr_scheduler_type", f"{T}.eval_strategy"),
         trainer.eval_for_schedule),
    Rule("warmup-longer", "source fault f", WARMUP, trainer.warmup_longer, "warn"),
    Rule("warmup-half", "source fault f", WARMUP, trainer.warmup_half, "warn"),
    Rule("warmup-constant", "transformers optimization", WARMUP, trainer.warmup_unused, "warn"),
    Rule("full-learning-rate", "source fault f", (f"{T}.learning_rate", "peft"), trainer.full_learning_rate, "warn"),
    Rule("step-counts", "transformers TrainingArguments", (f"{T}.logging_steps", f"{T}.eval_steps",
                                                           f"{T}.save_steps"), trainer.step_counts),
    Rule("prefetch", "transformers TrainingArguments", (f"{T}.dataloader_prefetch_factor",
                                                        f"{T}.dataloader_num_workers"), trainer.prefetch),
    Rule("empty-cache", "transformers TrainingArguments", (f"{T}.torch_empty_cache_steps",), trainer.empty_cache),
    Rule("find-batch-size", "T17", (f"{T}.auto_find_batch_size", "deepspeed"), trainer.find_batch_size),
    Rule("parallelism", "accelerate, tried", (f"{T}.parallelism_config",), trainer.parallelism),
    Rule("stream-length", "transformers Trainer.__init__", ("dataset.streaming", f"{T}.max_steps"),
         trainer.stream_length),
    Rule("stream-split", "datasets", ("dataset.streaming", "dataset.test_size"), trainer.stream_split),
    Rule("sampling", "transformers Trainer", (f"{T}.train_sampling_strategy", f"{T}.packing", "dataset.streaming"),
         trainer.grouping, "warn"),
    Rule("packing-wrapped", "T60", (f"{T}.packing", f"{T}.packing_strategy"), trainer.packing_wrapped),
    Rule("packing-length", "T61", (f"{T}.packing", f"{T}.eval_packing", f"{T}.max_length"), trainer.packing_length),
    Rule("padding-free", "T61", (f"{T}.padding_free", f"{T}.packing", f"{T}.max_length"), trainer.padding_free),
    Rule("loss-mask-format", "T63", (f"{T}.assistant_only_loss", f"{T}.completion_only_loss", "dataset.path"),
         trainer.loss_mask),
    Rule("neftune", "transformers neftune, tried", (f"{T}.neftune_noise_alpha",), trainer.neftune),
    Rule("liger-loss", "T62", (f"{T}.use_liger_kernel", f"{T}.liger_kernel_config"), trainer.liger_loss),
    Rule("device-map", "T22", (f"{T}.model_init_kwargs",), trainer.device_map),
    Rule("checkpointing-names", "T15", CHECKPOINTING, launch.checkpointing_names),
    Rule("selective-checkpointing", "T29", (*CHECKPOINTING, "peft", f"{Z}.stage"), launch.selective),
    Rule("reentrant", "T29 T30", (*CHECKPOINTING, "peft", f"{Z}.stage"), launch.reentrant, "warn"),
    # a quantized base
    Rule("quantized-bits", "transformers BitsAndBytesConfig", BITS, quantized.bits),
    Rule("quantized-defaults", "T45", (BITS[0], f"{Q}.bnb_4bit_quant_type", f"{Q}.bnb_4bit_compute_dtype"),
         quantized.unsaid_defaults, "warn"),
    Rule("quantized-full", "transformers Trainer.__init__", (*BITS, "peft"), quantized.full_fine_tuning),
    Rule("quantized-peft", "peft 0.21, tried", (*BITS, "peft.peft_type", "peft.init_lora_weights"),
         quantized.peft_method),
    Rule("quantized-saved-module", "peft 0.21, tried", (*BITS, "peft.modules_to_save", f"{Q}.llm_int8_skip_modules"),
         quantized.trained_whole),
    Rule("quantized-lora-bias", "T50", (*BITS, "peft.lora_bias"), quantized.lora_bias, "warn"),
    Rule("quantized-int8-sharded", "T43 T46", (BITS[1], f"{Z}.stage", "fsdp"), quantized.int8_sharded),
    Rule("quantized-int8-main", "transformers BitsAndBytesConfig", (BITS[1], f"{Q}.llm_int8_has_fp16_weight"),
         quantized.int8_main_weights),
    Rule("quantized-storage", "T42 T46", (BITS[0], f"{Q}.bnb_4bit_quant_storage", f"{T}.bf16", "deepspeed", "fsdp"),
         quantized.storage_dtype),
    Rule("quantized-cpu-offload", "transformers BitsAndBytesConfig", (f"{Q}.llm_int8_enable_fp32_cpu_offload",),
         quantized.cpu_offload),
    Rule("quantized-offload-param", "T44", (*BITS, f"{Z}.offload_param.device"), quantized.offload_param, "warn"),
    Rule("quantized-stored", "DeepSpeed#7096", (Q, "model.config.quantization_config"), quantized.stored_quantized),
    Rule("quantized-random", "kit/models/load.py", (Q, "model.random_init"), quantized.nothing_to_quantize),
    Rule("quantized-init-kwargs", "kit/models/load.py", (f"{T}.model_init_kwargs",), quantized.given_to_the_model),
    Rule("bitsandbytes", "transformers", BITS, quantized.bitsandbytes_missing, here=True),
    # trackers
    Rule("tracker-all", "transformers integration_utils", (trackers.KEY,), tracking.whatever_is_installed),
    Rule("tracker-missing", "transformers integration_utils", (trackers.KEY,), tracking.missing, here=True),
    Rule("tracker-online", "security", (trackers.KEY,), tracking.online, "warn"),
]  # fmt: skip
RULES = [*READING, *CHECKS]


def apply(facts: Facts, here: bool) -> tuple[list[Problem], list[Problem]]:
    """All refusals and all warnings of the table."""
    refused: list[Problem] = []
    warned: list[Problem] = []
    for rule in CHECKS:
        if rule.check is None or (rule.here and not here):
            continue
        for problem, key, fix in rule.check(facts):
            found = Problem(problem, facts.set_by(key), fix, rule.id)
            (refused if rule.severity == "refuse" else warned).append(found)
    return refused, warned
