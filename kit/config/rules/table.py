"""The one table of rules: everything that `kit check` refuses or warns of, and where the knowledge comes from.

A rule with a check is a function of the resolved run that yields nothing where all is well. A rule without one is
reported while the configuration is read and resolved, by the module that `reported_by` names.
"""

from __future__ import annotations

from kit.config import slurm
from kit.config.rules import adapter, launch, model, quantization, tracking, trainer
from kit.config.rules.context import Rule, RuleContext
from kit.schema import trackers


def reader_rule(reported_by: str, id: str, source: str, *keys: str) -> Rule:
    """Make a rule that the named module reports while it reads."""
    return Rule(id, source, keys, reported_by=reported_by)


Z = "deepspeed.zero_optimization"
READING = [
    reader_rule("config/compose", "override", "hydra override grammar"),
    reader_rule("config/compose", "group-choice", "hydra, T86"),
    reader_rule("config/compose", "run-file", "T80"),
    reader_rule("config/data_words", "data-word", "fault 31", "dataset.path"),
    reader_rule("config/compose", "environment-variable", "fault 23"),
    reader_rule("config/sections", "missing", "T79"),
    reader_rule("config/sections", "unknown-key", "T4 T62, fault 20"),
    reader_rule("schema/fields", "renamed-key", "T12 T15 T62"),
    reader_rule("schema/fields", "removed-key", "T12"),
    reader_rule("schema/fields", "missing-key", "the libraries' own classes"),
    reader_rule("schema/fields", "kind", "T79 T80"),
    reader_rule("schema/fields", "range", "T14 T18"),
    reader_rule("schema/fields", "choice", "the libraries' own classes"),
    reader_rule("config/deepspeed/check", "auto", "T3", "deepspeed"),
    reader_rule("config/deepspeed/findings", "doubled", "json, RFC 8259", "deepspeed"),
    Rule("literal", "T1 T5", ("deepspeed.train_batch_size",), severity="warn",
         reported_by="config/deepspeed/findings"),
    reader_rule("config/sections", "type", "kit/schema/run_plan.py"),
    reader_rule("config/sections", "section", "T79", "peft", "quantization", "deepspeed"),
    reader_rule("config/sections", "owned", "T76 T79, security", "trainer.output_dir", "trainer.deepspeed",
                "trainer.fsdp",
                "trainer.hub_token", "trainer.eos_token", "trainer.pad_token", "trainer.chat_template_path"),
    reader_rule("config/input_checks", "path", "T80", "model.name_or_path", "tokenizer.name_or_path", "dataset.path",
                "runs_dir"),
    reader_rule("config/input_checks", "script", "T80", "launch.script"),
    reader_rule("config/input_checks", "count", "T69", "launch.num_gpus", "launch.num_nodes"),
    reader_rule("config/nodes", "hostfile", "T69, deepspeed runner", "launch.hostfile", "launch.include",
                "launch.exclude",
                "launch.num_nodes", "launch.num_gpus"),
    reader_rule("config/resolve", "batch", "T5", "global_batch_size", "trainer.per_device_train_batch_size",
                "trainer.gradient_accumulation_steps", "launch.num_gpus"),
    reader_rule("config/sections", "peft-none", "kit/schema/run_plan.py", "peft"),
    reader_rule("config/sections", "peft-type", "peft PEFT_TYPE_TO_CONFIG_MAPPING", "peft.peft_type"),
    reader_rule("inspection/data_files", "dataset-files", "fault 31", "dataset.path", "dataset.eval_path"),
    reader_rule("data/files", "dataset-rows", "fault 24", "dataset.path", "dataset.eval_path"),
    reader_rule("data/files", "dataset-unreadable", "fault 31", "dataset.path", "dataset.eval_path"),
    reader_rule("data/formats", "dataset-columns", "fault 30", "dataset.columns", "dataset.path"),
    reader_rule("data/formats", "dataset-format", "fault 30", "dataset.format", "dataset.columns"),
    reader_rule("data/row_template", "dataset-template", "fault 30", "dataset.template", "dataset.columns"),
    reader_rule("data/prepare", "bad-rows", "faults 25 to 29, T63", "dataset.on_bad_row", "dataset.max_bad_rows",
                "dataset.on_long_row"),
    reader_rule("inspection/hub_dataset", "dataset-configuration", "datasets", "dataset.name"),
    reader_rule("inspection/data_files", "dataset-split", "datasets", "dataset.split", "dataset.eval_split", "dataset.path"),
    reader_rule("config/input_checks", "held-out", "datasets train_test_split", "dataset.test_size",
                "dataset.validation_size"),
    reader_rule("inspection/model", "model-folder", "T40", "model.name_or_path"),
    reader_rule("inspection/model", "model-files", "T25, security", "model.name_or_path"),
    reader_rule("inspection/model", "hub", "huggingface_hub", "model.name_or_path", "model.revision"),
    reader_rule("inspection/model", "offline", "T39", "model.name_or_path", "tokenizer.name_or_path", "dataset.path"),
    reader_rule("inspection/architectures", "architecture", "transformers' models", "model.name_or_path",
                "model.config.model_type"),
    reader_rule("inspection/tokenizer", "tokenizer-files", "fault 34", "tokenizer.name_or_path"),
    reader_rule("inspection/tokenizer", "chat-template", "T93, fault 34", "tokenizer.chat_template", "dataset.format"),
    reader_rule("inspection/tokenizer", "chat-template-name", "T93", "tokenizer.chat_template"),
    reader_rule("inspection/tokenizer", "special-token", "fault 34", "tokenizer.pad_token", "tokenizer.eos_token",
                "tokenizer.bos_token"),
    reader_rule("inspection/tokenizer", "special-token-missing", "fault 34", "tokenizer.pad_token",
                "tokenizer.eos_token"),
    reader_rule("inspection/tokenizer", "vocabulary", "fault 35", "tokenizer.name_or_path", "tokenizer.added_tokens"),
    reader_rule("config/added_tokens", "added-tokens", "T26 T33 T65", "tokenizer.added_tokens", "peft.modules_to_save",
                "peft.target_modules", "peft.trainable_token_indices"),
    reader_rule("config/added_tokens", "token-indices-tied", "T51 T65", "peft.trainable_token_indices"),
    reader_rule("config/initial_adapter", "init-from", "T57, fault 36", "peft.init_from", "peft.init_from_pickle"),
    reader_rule("config/initial_adapter", "init-from-files", "fault 36, security", "peft.init_from"),
    reader_rule("config/initial_adapter", "init-from-base", "fault 36", "peft.init_from", "model.name_or_path"),
    reader_rule("config/sections", "deepspeed-file", "T4", "deepspeed.file"),
    reader_rule("config/deepspeed/check", "zero-block", "T4 T12", Z),
    reader_rule("config/deepspeed/check", "deepspeed", "T11 T18", "deepspeed"),
    reader_rule("config/deepspeed/resolve", "mismatch", "T1 T5 T8", "deepspeed", "trainer"),
    reader_rule("config/deepspeed/resolve", "hidden-size", "T2 T3 T16", f"{Z}.reduce_bucket_size",
                f"{Z}.stage3_prefetch_bucket_size", f"{Z}.stage3_param_persistence_threshold",
                "model.config.hidden_size"),
    reader_rule("config/deepspeed/resolve", "optimizer", "T9", "deepspeed.optimizer", "trainer.optim"),
    reader_rule("config/deepspeed/resolve", "offload-optimizer", "T10", f"{Z}.offload_optimizer.device",
                "trainer.optim", "deepspeed.zero_force_ds_cpu_optimizer"),
    reader_rule("config/deepspeed/resolve", "scheduler", "T14", "deepspeed.scheduler", "trainer.max_steps",
                "trainer.warmup_steps"),
]  # fmt: skip

T, Q = "trainer", "quantization"
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
    Rule("bf16-hardware", "T72, fault 22", (f"{T}.bf16",), launch.bf16_lacking, on_this_machine=True),
    Rule("bf16-slow-cpu", "T83", (f"{T}.bf16", f"{T}.use_cpu"), launch.bf16_slow_cpu, "warn", on_this_machine=True),
    Rule("gpus-missing", "T69", ("launch.num_gpus",), launch.gpus_missing, on_this_machine=True),
    Rule("local-one-process", "T66", ("launch.launcher", "launch.num_gpus", "launch.num_nodes"),
         launch.one_process_local),
    Rule("hostfile-unread", "torchrun", ("launch.launcher", "launch.hostfile", "launch.include", "launch.exclude"),
         launch.hostfile_unread),
    Rule("node-rank", "deepspeed runner", ("launch.node_rank", "launch.num_nodes", "launch.hostfile", "launch.no_ssh",
         "launch.slurm"), launch.node_rank),
    Rule("port-taken", "T70", ("launch.master_port",), launch.port_taken, on_this_machine=True),
    Rule("host-memory", "T24", (f"{Z}.stage", "model.name_or_path"), launch.host_memory, on_this_machine=True),
    Rule("quantized-gpu-memory", "T41", (*BITS, "model.name_or_path"), launch.quantized_gpu_memory,
         on_this_machine=True),
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
    Rule("lm-head-target", "T38", ("peft.target_modules",), adapter.lm_head_target),
    Rule("targets-match", "fault 37", ("peft.target_modules",), adapter.targets_match_nothing),
    Rule("patterns-match", "T52", ("peft.rank_pattern", "peft.alpha_pattern"), adapter.patterns_match_nothing),
    Rule("saved-match", "peft 0.21, tried", ("peft.modules_to_save",), adapter.saved_match_nothing),
    Rule("loftq-packages", "peft LoraConfig", ("peft.init_lora_weights",), adapter.loftq_packages,
         on_this_machine=True),
    Rule("layers-range", "peft 0.21, tried",
         ("peft.layers_to_transform", "peft.layers_pattern", "peft.target_modules"), adapter.layers_range),
    Rule("tied-target", "T51", ("peft.target_modules",), adapter.tied_target, "warn"),
    Rule("tied-saved", "T51", ("peft.modules_to_save", "peft.ensure_weight_tying"), adapter.tied_saved, "warn"),
    Rule("prefix-checkpointing", "peft PeftModel", ("peft.peft_type", *CHECKPOINTING[::2]),
         adapter.prefix_checkpointing),
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
    Rule("loss-mask-format", "T63", ("dataset.train_on", f"{T}.assistant_only_loss", f"{T}.completion_only_loss"),
         trainer.loss_mask),
    Rule("neftune", "transformers neftune, tried", (f"{T}.neftune_noise_alpha",), trainer.neftune),
    Rule("liger-loss", "T62", (f"{T}.use_liger_kernel", f"{T}.liger_kernel_config"), trainer.liger_loss),
    Rule("device-map", "T22", (f"{T}.model_init_kwargs",), trainer.device_map),
    Rule("checkpointing-names", "T15", CHECKPOINTING, launch.checkpointing_names),
    Rule("selective-checkpointing", "T29", (*CHECKPOINTING, "peft", f"{Z}.stage"), launch.selective),
    Rule("reentrant", "T29 T30", (*CHECKPOINTING, "peft", f"{Z}.stage"), launch.reentrant, "warn"),
    # a quantized base
    Rule("quantized-bits", "transformers BitsAndBytesConfig", BITS, quantization.bits),
    Rule("quantized-defaults", "T45", (BITS[0], f"{Q}.bnb_4bit_quant_type", f"{Q}.bnb_4bit_compute_dtype"),
         quantization.unsaid_defaults, "warn"),
    Rule("quantized-full", "transformers Trainer.__init__", (*BITS, "peft"), quantization.full_fine_tuning),
    Rule("quantized-peft", "peft 0.21, tried", (*BITS, "peft.peft_type", "peft.init_lora_weights"),
         quantization.peft_method),
    Rule("quantized-saved-module", "peft 0.21, tried", (*BITS, "peft.modules_to_save", f"{Q}.llm_int8_skip_modules"),
         quantization.trained_whole),
    Rule("quantized-lora-bias", "T50", (*BITS, "peft.lora_bias"), quantization.lora_bias, "warn"),
    Rule("quantized-int8-sharded", "T43 T46", (BITS[1], f"{Z}.stage", "fsdp"), quantization.int8_sharded),
    Rule("quantized-int8-main", "transformers BitsAndBytesConfig", (BITS[1], f"{Q}.llm_int8_has_fp16_weight"),
         quantization.int8_main_weights),
    Rule("quantized-storage", "T42 T46", (BITS[0], f"{Q}.bnb_4bit_quant_storage", f"{T}.bf16", "deepspeed", "fsdp"),
         quantization.storage_dtype),
    Rule("quantized-cpu-offload", "transformers BitsAndBytesConfig", (f"{Q}.llm_int8_enable_fp32_cpu_offload",),
         quantization.cpu_offload),
    Rule("quantized-offload-param", "T44", (*BITS, f"{Z}.offload_param.device"), quantization.offload_param, "warn"),
    Rule("quantized-stored", "DeepSpeed#7096", (Q, "model.config.quantization_config"), quantization.stored_quantized),
    Rule("quantized-random", "kit/models/load.py", (Q, "model.random_init"), quantization.nothing_to_quantize),
    Rule("quantized-init-kwargs", "kit/models/load.py", (f"{T}.model_init_kwargs",), quantization.given_to_the_model),
    Rule("bitsandbytes", "transformers", BITS, quantization.bitsandbytes_missing, on_this_machine=True),
    # trackers
    Rule("tracker-all", "transformers integration_utils", (trackers.KEY,), tracking.whatever_is_installed),
    Rule("tracker-missing", "transformers integration_utils", (trackers.KEY,), tracking.missing, on_this_machine=True),
    Rule("tracker-online", "security", (trackers.KEY,), tracking.online, "warn"),
]  # fmt: skip
RULES = [*READING, *CHECKS]


def apply_rules(run: RuleContext) -> None:
    """Report every refusal and every warning of the table."""
    for rule in CHECKS:
        if rule.check is None or (rule.on_this_machine and not run.on_this_machine):
            continue
        add = run.report.problem if rule.severity == "refuse" else run.report.warning
        for problem, key, fix in rule.check(run):
            add(key, problem, fix, rule.id)
