"""An Axolotl YAML. Upstream: axolotl utils/schemas/*.py, core/builders/base.py, prompters.py (July 2026)."""

from __future__ import annotations

import re
from typing import Any

from kit.errors import KitError
from kit.importing import prompts, trl
from kit.importing.report import Key, Reading

NAMES = {
    "base_model": "model.name_or_path",
    "tokenizer_config": "tokenizer.name_or_path",
    "lora_r": "peft.r",
    "lora_alpha": "peft.lora_alpha",
    "lora_fan_in_fan_out": "peft.fan_in_fan_out",
    "lora_modules_to_save": "peft.modules_to_save",
    "lora_target_parameters": "peft.target_parameters",
    "lora_rank_pattern": "peft.rank_pattern",
    "lora_alpha_pattern": "peft.alpha_pattern",
    "lora_model_dir": "peft.init_from",
    "lora_dropout": "peft.lora_dropout",
    "peft_layers_to_transform": "peft.layers_to_transform",
    "peft_layers_pattern": "peft.layers_pattern",
    "peft_use_dora": "peft.use_dora",
    "peft_use_rslora": "peft.use_rslora",
    "peft_layer_replication": "peft.layer_replication",
    "peft_init_lora_weights": "peft.init_lora_weights",
    "peft_trainable_token_indices": "peft.trainable_token_indices",
    "peft_ensure_weight_tying": "peft.ensure_weight_tying",
    "micro_batch_size": "trainer.per_device_train_batch_size",
    "eval_batch_size": "trainer.per_device_eval_batch_size",
    "optimizer": "trainer.optim",
    "lr_scheduler": "trainer.lr_scheduler_type",
    "num_epochs": "trainer.num_train_epochs",
    "sequence_len": "trainer.max_length",
    "sample_packing": "trainer.packing",
    "eval_sample_packing": "trainer.eval_packing",
    "dataset_processes": "trainer.dataset_num_proc",
    "wandb_name": "trainer.run_name",
    "mlflow_run_name": "trainer.run_name",
    "trackio_run_name": "trainer.run_name",
    "noisy_embedding_alpha": "trainer.neftune_noise_alpha",
    "gc_steps": "trainer.torch_empty_cache_steps",
}
PEFT = [name for name, key in NAMES.items() if key.startswith("peft.")]
CUSTOM_OPTIMIZERS = (
    "muon dion sinkgd optimi_adamw ao_adamw_4bit ao_adamw_8bit ao_adamw_fp8 adopt_adamw came_pytorch "
    "q_galore_adamw8bit flash_adamw flash_adam flash_sgd flash_sgdw flash_lion"
).split()
SAME = {
    "model_type": "found from the model's config.json",
    "type_of_model": "found from the model's config.json",
    "tokenizer_type": "found from the tokenizer's files",
    "base_model_config": "the model's own config.json",
    "is_falcon_derived_model": "found from config.json",
    "is_llama_derived_model": "found from config.json",
    "is_mistral_derived_model": "found from config.json",
    "is_qwen_derived_model": "found from config.json",
    "tokenizer_use_fast": "transformers 5 has one kind",
    "tokenizer_save_jinja_files": "the template is saved with the adapter",
    "dataset_prepared_path": "the data is prepared when the run starts",
    "dataset_keep_in_memory": "datasets decides",
    "save_safetensors": "safetensors is the only format",
    "pad_to_sequence_len": "a matter of speed: rows are padded to a multiple, packed ones not at all",
    "flash_attn_cross_entropy": "the loss is computed in chunks",
    "low_cpu_mem_usage": "weights are read shard by shard",
    "lora_on_cpu": "for their merging; kit merge works on the CPU",
    "hf_use_auth_token": "the token comes from the environment",
    "strict": "unknown keys are always refused here",
    "local_rank": "the launcher gives every rank its number",
    "world_size": "launch.num_gpus counts processes",
    "ddp": "the launcher decides",
    "device": "trainer.use_cpu decides",
    "device_map": "training places the model itself",
    "sample_packing_group_size": "TRL packs best-fit over the whole data set",
    "sample_packing_bin_size": "TRL packs best-fit over the whole data set",
    "shuffle_merged_datasets": "rows are shuffled by the sampler",
    "experimental_skip_move_to_device": "the kit loads its own way",
    "merge_method": "kit merge streams",
    "include_tkps": "tokens per second are in metrics.jsonl",
    "wandb_mode": "offline unless WANDB_MODE says otherwise",
    "qlora_sharded_model_loading": "the kit loads its own way",
}
SCRIPT = "launch.script=my_train.py with your own callback"
LEFT = {
    "plugins": ("the kit has no plugins", "trainer.use_liger_kernel=true for Liger's kernels"),
    "lora_mlp_kernel": ("the kit picks its kernels", ""),
    "lora_qkv_kernel": ("the kit picks its kernels", ""),
    "lora_o_kernel": ("the kit picks its kernels", ""),
    "lora_embedding_kernel": ("the kit picks its kernels", ""),
    "unfrozen_parameters": ("every weight trains, or an adapter", "peft.modules_to_save=[...]"),
    "loraplus_lr_ratio": ("no LoRA+ here", SCRIPT),
    "loraplus_lr_embedding": ("no LoRA+ here", SCRIPT),
    "peft_autocast_adapter_dtype": ("the adapter's dtype is the kit's to choose", ""),
    "relora": ("no ReLoRA here", ""),
    "jagged_restart_steps": ("no restarts here", "trainer.lr_scheduler_type=cosine_with_restarts"),
    "embedding_lr": ("one learning rate for all", SCRIPT),
    "embedding_lr_scale": ("one learning rate for all", SCRIPT),
    "lr_groups": ("one learning rate for all", SCRIPT),
    "lr_quadratic_warmup": ("no such warm-up here", "trainer.warmup_steps warms up in a line"),
    "cosine_constant_lr_ratio": ("no such schedule here", "trainer.lr_scheduler_type=warmup_stable_decay"),
    "torchdistx_path": ("no torchdistX here", "trainer.optim=adamw_torch_fused"),
    "xformers_attention": ("transformers has no such attention", "model.attn_implementation=sdpa"),
    "sage_attention": ("transformers has no such attention", "model.attn_implementation=sdpa"),
    "flash_optimum": ("no BetterTransformer here", "model.attn_implementation=sdpa"),
    "s2_attention": ("no shifted sparse attention here", ""),
    "flash_attn_fuse_mlp": ("no such kernel here", "trainer.use_liger_kernel=true"),
    "loss_watchdog_threshold": ("the run stops at a loss that is not finite, at no other", SCRIPT),
    "loss_watchdog_patience": ("the run stops at a loss that is not finite, at no other", SCRIPT),
    "early_stopping_patience": ("no early stopping here", "trainer.load_best_model_at_end=true, or " + SCRIPT),
    "eval_table_size": ("generations are a verb here", "kit generate RUN"),
    "eval_max_new_tokens": ("generations are a verb here", "kit generate RUN"),
    "generate_samples": ("generations are a verb here", "kit generate RUN"),
    "do_bench_eval": ("benchmarks are not run while training", "kit eval RUN"),
    "do_causal_lm_eval": ("metrics are a verb here", "kit eval RUN"),
    "max_memory": ("training places the model itself", ""),
    "gpu_memory_limit": ("training places the model itself", ""),
    "hub_model_id": ("nothing is pushed while training", "huggingface-cli upload REPO RUN/adapter"),
    "hub_strategy": ("nothing is pushed while training", "huggingface-cli upload REPO RUN/adapter"),
    "hub_revision": ("nothing is pushed while training", "huggingface-cli upload REPO RUN/adapter"),
    "push_dataset_to_hub": ("prepared data is not pushed", ""),
    "output_dir": ("the run directory holds everything", "runs_dir=FOLDER name=NAME"),
    "resume_from_checkpoint": ("another tool's checkpoint cannot be continued", "peft.init_from=ADAPTER"),
    "auto_resume_from_checkpoints": ("resuming is a verb here", "kit resume RUN"),
    "wandb_project": ("trackers take their project from the environment", "export WANDB_PROJECT=..."),
    "wandb_entity": ("the environment says it", "export WANDB_ENTITY=..."),
    "wandb_watch": ("the environment says it", "export WANDB_WATCH=..."),
    "wandb_log_model": ("the environment says it", "export WANDB_LOG_MODEL=..."),
    "wandb_run_id": ("the environment says it", "export WANDB_RUN_ID=..."),
    "mlflow_tracking_uri": ("the environment says it", "export MLFLOW_TRACKING_URI=..."),
    "mlflow_experiment_name": ("the environment says it", "export MLFLOW_EXPERIMENT_NAME=..."),
    "default_system_message": ("the template is the tokenizer's", "dataset.template.system, or your own template"),
    "chat_template_kwargs": ("the template is the tokenizer's", "a template of your own"),
    "fix_untrained_tokens": ("new tokens' embeddings are trained instead", ""),
    "resize_token_embeddings_to_32x": ("the embedding grows by the added tokens alone", ""),
    "dataset_exact_deduplication": ("rows are taken as they are", "remove doubles beforehand"),
    "dataset_shard_num": ("no shards of a data set", "dataset.limit"),
    "dataset_shard_idx": ("no shards of a data set", "dataset.limit"),
    "min_sample_len": ("no shortest row", "remove short rows beforehand"),
    "eval_sequence_len": ("one length for both", "trainer.max_length"),
    "curriculum_sampling": ("rows are shuffled", ""),
    "sample_packing_sequentially": ("rows are shuffled before packing", ""),
    "fp8": ("no fp8 training here", "trainer.bf16=true"),
    "deepcompile": ("a key of the DeepSpeed JSON", "deepspeed.compile.deepcompile=true"),
    "sequence_parallel_degree": ("no sequence parallelism here", ""),
    "context_parallel_size": ("no context parallelism here", ""),
    "tensor_parallel_size": ("no tensor parallelism here", ""),
    "dp_shard_size": ("every rank shards", ""),
    "dp_replicate_size": ("every rank shards", ""),
    "gptq": ("no GPTQ base here", "quantization=nf4"),
    "model_config": ("the model's own config.json stands", ""),
    "overrides_of_model_config": ("the model's own config.json stands", ""),
    "rope_scaling": ("the model's own config.json stands", ""),
    "model_kwargs": ("no such door here", "trainer.model_init_kwargs.KEY=..."),
    "save_first_step": ("the first step is not saved by itself", "trainer.save_steps=1 for a test"),
    "added_tokens_overrides": ("tokens are added, not renamed", "tokenizer.added_tokens=[...]"),
    "eot_tokens": ("the end of a turn is the template's", "tokenizer.eos_token=..."),
    "pretraining_dataset": ("streams of plain text", "dataset.path=... dataset.streaming=true"),
    "batch_flattening": ("padding-free batches", "trainer.padding_free=true"),
}  # fmt: skip
NOT_SFT = ("rl", "reward_model", "process_reward_model")
THEIR_DEFAULTS = {
    "per_device_train_batch_size": 1, "learning_rate": None, "lr_scheduler_type": "cosine", "num_train_epochs": 1.0,
    "max_length": 512, "save_strategy": "epoch", "save_total_limit": 4, "logging_steps": 10,
    "gradient_checkpointing": False, "warmup_steps": 0.03, "average_tokens_across_devices": False,
}  # fmt: skip


def read(r: Reading) -> None:
    for name in NOT_SFT:
        if r.get(name):
            raise KitError(
                f"{name}: {r.get(name)} is no supervised fine-tuning run", r.name, "the kit trains SFT alone"
            )
        r.left({name: ("", "")})
    optimizer(r)
    method(r)
    attention(r)
    precision(r)
    steps(r)
    trackers(r)
    tokens(r)
    datasets(r)
    trl.deepspeed(r)
    for name, key in NAMES.items():
        if r.has(name) and not r.empty(name):
            r.carry((name,), key, r.get(name))
    trl.revision(r, "revision_of_model")
    trl.revision(r, "model_revision")
    r.equal(SAME)
    r.left(LEFT)
    liger(r)
    trl.training_arguments(r)
    theirs = dict(THEIR_DEFAULTS)
    if "trainer.per_device_train_batch_size" in r.recipe.values:
        theirs["per_device_eval_batch_size"] = r.recipe.values["trainer.per_device_train_batch_size"]
    else:
        theirs["per_device_eval_batch_size"] = 1
    theirs.pop("learning_rate")
    if r.get("learning_rate") is None:
        r.recipe.notes.append("Axolotl needs a learning_rate and the file has none: the kit's own stands")
        theirs["learning_rate"] = 2.0e-4
    trl.defaults(r, theirs, "Axolotl")
    if "warmup_steps" not in r.tree and r.get("warmup_ratio") is None:
        r.recipe.notes.append("Axolotl's own warm-up is 3% of the steps and at most 100; the limit is not carried")
    if r.get("excess_length_strategy") in (None, "drop"):
        r.recipe.notes.append("Axolotl drops rows longer than sequence_len; here they are cut at trainer.max_length")


def optimizer(r: Reading) -> None:
    name = r.get("optimizer")
    if r.has("optimizer") and name in CUSTOM_OPTIMIZERS:
        r.leave(("optimizer",), f"transformers has no optimizer {name}", "trainer.optim=adamw_torch_fused")
    if r.get("lr_scheduler") in ("one_cycle", "rex"):
        r.leave(("lr_scheduler",), "no such schedule here", "trainer.lr_scheduler_type=cosine")
    if r.has("cosine_min_lr_ratio") and not r.empty("cosine_min_lr_ratio"):
        ratio = r.get("cosine_min_lr_ratio")
        r.carry(("cosine_min_lr_ratio",), "trainer.lr_scheduler_kwargs", {"min_lr_rate": ratio})
        r.carry(("cosine_min_lr_ratio",), "trainer.lr_scheduler_type", "cosine_with_min_lr")
        if r.has("lr_scheduler"):
            r.same(("lr_scheduler",), "cosine_min_lr_ratio chooses cosine_with_min_lr")
    if isinstance(r.get("optim_args"), dict) and r.has("optim_args"):
        r.carry(("optim_args",), "trainer.optim_args", ",".join(f"{k}={v}" for k, v in r.get("optim_args").items()))


def method(r: Reading) -> None:
    adapter = r.get("adapter")
    if adapter not in (None, "", "lora", "qlora"):
        raise KitError(f"adapter: {adapter} is not known here", r.name, "adapter: lora, qlora, or none")
    if r.has("adapter"):
        r.choose(("adapter",), "peft", "lora" if adapter else "none")
    else:
        r.recipe.groups["peft"] = "none"
        r.recipe.theirs["peft=none"] = "Axolotl trains every weight where adapter is not given"
    for name, group in (("load_in_4bit", "nf4"), ("load_in_8bit", "int8")):
        if r.has(name):
            if r.get(name) is True:
                r.choose((name,), "quantization", group)
            else:
                r.same((name,), "off, as here")
    if isinstance(r.get("bnb_config_kwargs"), dict):
        r.table(
            {k: f"quantization.{k}" for k in r.get("bnb_config_kwargs") if isinstance(k, str)}, "bnb_config_kwargs"
        )
    if not adapter:
        r.equal(dict.fromkeys([*PEFT, "lora_target_modules", "lora_target_linear"], "not read: no adapter"))
        return
    named, linear = r.get("lora_target_modules"), r.get("lora_target_linear") is True
    if r.has("lora_target_linear"):
        if linear:
            r.carry(("lora_target_linear",), "peft.target_modules", "all-linear")
        else:
            r.same(("lora_target_linear",), "off: lora_target_modules says it")
    if r.has("lora_target_modules") and not r.empty("lora_target_modules"):
        if linear:
            r.same(("lora_target_modules",), "all linear layers hold these too")
        else:
            r.carry(("lora_target_modules",), "peft.target_modules", named)
    elif not linear:
        r.recipe.default("peft.target_modules", None, "Axolotl leaves the choice to PEFT")
    if isinstance(r.get("peft"), dict) and "loftq_config" in r.get("peft"):
        r.carry(("peft", "loftq_config"), "peft.loftq_config", r.get("peft", "loftq_config"))
        r.carry(("peft", "loftq_config"), "peft.init_lora_weights", "loftq")


def attention(r: Reading) -> None:
    kinds = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "flex_attention": "flex_attention",
             "eager_attention": "eager"}  # fmt: skip
    for name, kind in kinds.items():
        if r.has(name):
            if r.get(name) in (True, "auto"):
                r.carry((name,), "model.attn_implementation", kind)
            else:
                r.same((name,), "off: another attention")
    given = r.get("attn_implementation")
    if r.has("attn_implementation") and not r.empty("attn_implementation"):
        if given in ("xformers", "sage", "s2", "fp8"):
            r.leave(
                ("attn_implementation",), f"transformers has no {given} attention", "model.attn_implementation=sdpa"
            )
        else:
            r.carry(("attn_implementation",), "model.attn_implementation", given)


def precision(r: Reading) -> None:
    for name, flag in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16"), ("float16", "fp16")):
        if r.has(name) and not r.empty(name):
            value = r.get(name)
            if value == "full":
                r.carry((name,), "trainer.bf16_full_eval", True, "and the weights are bfloat16")
            elif name in ("bfloat16", "float16") and value is False:
                r.same((name,), "off, as here")
            elif name in ("bfloat16", "float16"):
                r.carry((name,), f"trainer.{flag}", value)
                r.carry((name,), "model.dtype", name)
            else:
                r.carry((name,), f"trainer.{flag}", value)
    if r.has("float32"):
        r.same(("float32",), "bf16 and fp16 say it")
    if r.has("tf32"):
        if r.get("tf32") in (True, False):
            r.carry(("tf32",), "trainer.tf32", r.get("tf32"))
        else:
            r.same(("tf32",), "auto leaves torch's own setting")
    value = r.get("gradient_checkpointing")
    if r.has("gradient_checkpointing") and isinstance(value, str) and value not in ("true", "false"):
        r.carry(("gradient_checkpointing",), "trainer.gradient_checkpointing", True)
        r.carry(("gradient_checkpointing",), "trainer.activation_offloading", True, "to the CPU")
    if r.has("activation_offloading") and isinstance(r.get("activation_offloading"), str):
        r.carry(("activation_offloading",), "trainer.activation_offloading", True, "to the CPU")


def steps(r: Reading) -> None:
    total, micro = r.get("batch_size"), r.get("micro_batch_size", default=1)
    if r.has("batch_size") and not r.empty("batch_size"):
        if r.get("gradient_accumulation_steps"):
            r.same(("batch_size",), "not read: gradient_accumulation_steps is given")
        elif isinstance(total, int) and isinstance(micro, int) and micro > 0 and total >= micro:
            note = f"{total} rows per process in batches of {micro}"
            r.carry(("batch_size",), "trainer.gradient_accumulation_steps", total // micro, note)
            if r.has("gradient_accumulation_steps"):
                r.same(("gradient_accumulation_steps",), "batch_size says it")
        else:
            r.leave(("batch_size",), "no whole number of micro batches", "trainer.gradient_accumulation_steps=N")
    epochs = r.get("num_epochs", default=1)
    held_out = bool(r.get("val_set_size")) or bool(r.get("test_datasets"))
    for name, key in (("evals_per_epoch", "eval"), ("saves_per_epoch", "save")):
        if not r.has(name) or r.empty(name):
            continue
        times = r.get(name)
        if not times or (key == "eval" and not held_out):
            r.same((name,), "nothing is held out to evaluate" if times else "switched off, as here")
            continue
        share = (
            1.0 / (times * epochs)
            if isinstance(times, int | float) and isinstance(epochs, int | float) and epochs
            else 1
        )
        if share < 1:
            r.carry((name,), f"trainer.{key}_steps", round(share, 6), "a share of all steps")
            r.carry((name,), f"trainer.{key}_strategy", "steps")
        elif key == "save":
            r.carry((name,), "trainer.save_strategy", "epoch")
        else:
            r.carry((name,), "trainer.eval_strategy", "epoch")
    for key in ("eval", "save"):
        name = f"{key}_steps"
        if r.has(name) and not r.empty(name):
            if key == "eval" and not held_out:
                r.same((name,), "nothing is held out to evaluate")
            else:
                r.carry((name,), f"trainer.{name}", r.get(name))
                r.carry((name,), f"trainer.{key}_strategy", "steps")
                if r.has(f"{key}_strategy"):
                    r.same((f"{key}_strategy",), f"{name} is given")
    if r.has("eval_strategy") and not held_out:
        r.same(("eval_strategy",), "nothing is held out to evaluate")
    if r.has("max_steps") and r.get("max_steps") == 0:
        r.same(("max_steps",), "0: the epochs say it")


def trackers(r: Reading) -> None:
    for name in ("wandb", "mlflow", "tensorboard", "trackio", "comet"):
        on = r.get(f"use_{name}") is True or bool(r.get(f"{name}_project"))
        if r.has(f"use_{name}"):
            if not r.get(f"use_{name}"):
                r.same((f"use_{name}",), "off, as here")
            elif name == "comet":
                r.carry(("use_comet",), "trainer.report_to", ["comet_ml"])
            else:
                r.choose((f"use_{name}",), "tracking", name)
        elif on and name == "wandb":
            r.recipe.groups["tracking"] = "wandb"
            r.recipe.theirs["tracking=wandb"] = "Axolotl reports to wandb where wandb_project is given"
    for name in ("wandb_name", "mlflow_run_name", "trackio_run_name"):
        if r.has(name) and not r.get(name):
            r.same((name,), "empty")


def tokens(r: Reading) -> None:
    at = "special_tokens"
    if isinstance(r.get(at), dict):
        names = ("pad_token", "eos_token", "bos_token")
        r.table({n: f"tokenizer.{n}" for n in names}, at)
        r.left({"unk_token": ("the tokenizer's own stands", "a tokenizer of your own: tokenizer.name_or_path")}, at)
    elif r.has(at):
        r.same((at,), "empty")
    added: list[Any] = []
    for path in ((at, "additional_special_tokens"), ("tokens",)):
        if r.has(*path) and not r.empty(*path):
            added += r.get(*path) if isinstance(r.get(*path), list) else [r.get(*path)]
            note = "added as special tokens" if path == ("tokens",) else ""
            r.carry(path, "tokenizer.added_tokens", list(added), note)
    template(r, ("chat_template",))
    jinja = r.get("chat_template_jinja")
    if r.has("chat_template_jinja") and jinja:
        if "\n" not in str(jinja) and str(jinja).endswith(".jinja"):
            r.carry(("chat_template_jinja",), "tokenizer.chat_template", jinja)
        else:
            r.leave(
                ("chat_template_jinja",),
                "a template is a file here",
                "write it to my.jinja; tokenizer.chat_template=my.jinja",
            )
    elif r.has("chat_template_jinja"):
        r.same(("chat_template_jinja",), "empty")


def template(r: Reading, path: Key) -> None:
    if not r.has(*path) or r.empty(*path):
        return
    name = str(r.get(*path))
    if name in ("tokenizer_default", "jinja") or name.startswith("tokenizer_default_fallback_"):
        r.same(path, "the tokenizer's own template" if name != "jinja" else "chat_template_jinja holds it")
    elif name == "chatml":
        r.carry(path, "tokenizer.chat_template", "chatml")
    else:
        r.leave(path, "the tokenizer's own template is used, and what Axolotl calls so may differ",
                f"tokenizer.chat_template={name} if kit check knows it, or FILE.jinja")  # fmt: skip


def datasets(r: Reading) -> None:
    listed = r.get("datasets")
    if isinstance(listed, list) and listed and isinstance(listed[0], dict):
        one(r, ("datasets", 0), listed[0])
        for number in range(1, len(listed)):
            r.leave(("datasets", number), "the kit trains on one data set", "join the files in one folder")
    held = r.get("test_datasets")
    if isinstance(held, list) and held and isinstance(held[0], dict):
        place = where(held[0])
        if place and "path" in held[0]:
            r.carry(("test_datasets", 0, "path"), "dataset.eval_path", place)
            if held[0].get("data_files") == place and r.has("test_datasets", 0, "data_files"):
                r.same(("test_datasets", 0, "data_files"), "the file of eval_path")
        if "split" in held[0] and held[0].get("path") == (listed or [{}])[0].get("path"):
            r.carry(("test_datasets", 0, "split"), "dataset.eval_split", held[0]["split"])
            r.recipe.drop("dataset.eval_path", "a split of the same data set")
        for name in ("type", "ds_type", "field_messages"):
            if r.has("test_datasets", 0, name) and (listed or [{}])[0].get(name) == held[0][name]:
                r.same(("test_datasets", 0, name), "as the training rows")
    if r.has("val_set_size") and not r.empty("val_set_size"):
        if r.get("val_set_size"):
            r.carry(("val_set_size",), "dataset.test_size", r.get("val_set_size"))
        else:
            r.same(("val_set_size",), "nothing is held out, as here")


def where(block: dict[str, Any]) -> str | None:
    files = block.get("data_files")
    files = files[0] if isinstance(files, list) and len(files) == 1 else files
    if isinstance(files, str) and block.get("path") in ("json", "csv", "parquet", "arrow", "text", files):
        return files
    return block.get("path")


def one(r: Reading, at: Key, block: dict[str, Any]) -> None:
    """The data set that is trained on: its place, and its rows written as the kit's template writes them."""
    place = where(block)
    if r.has(*at, "path"):
        if place != block["path"]:
            r.same((*at, "path"), "the suffix of the file says it")
        else:
            r.carry((*at, "path"), "dataset.path", place)
    if r.has(*at, "data_files") and not r.empty(*at, "data_files"):
        if place and place != block.get("path"):
            r.carry((*at, "data_files"), "dataset.path", place)
        else:
            r.leave((*at, "data_files"), "one file or folder", "dataset.path=FILE")
    r.table({"name": "dataset.name", "split": "dataset.split", "revision": "dataset.revision"}, *at)
    r.equal({"ds_type": "the suffix of the file says it", "preprocess_shards": "a matter of memory there"}, *at)
    if r.has(*at, "trust_remote_code"):
        r.left({"trust_remote_code": ("data sets run no code here", "")}, *at)
    rows(r, at, block)
    for name in ("roles", "drop_system_message", "message_field_training", "roles_to_train", "train_on_eos", "train_on_eot",
                 "shards", "shards_idx", "field_tools", "field_thinking", "conversation", "input_transform"):  # fmt: skip
        if r.has(*at, name):
            usual = (name == "roles_to_train" and block[name] == ["assistant"]) or (
                name in ("train_on_eos", "train_on_eot") and block[name] == "turn"
            )
            if usual or block[name] in (None, False, [], {}):
                r.same((*at, name), "the same here")
            else:
                r.leave((*at, name), "the template's marks say what is trained", "a template of your own")


def rows(r: Reading, at: Key, block: dict[str, Any]) -> None:
    kind = block.get("type")
    whole = r.get("train_on_inputs") is True
    path = (*at, "type")
    base = str(kind).split(":")[0].split(".")[0] if isinstance(kind, str) else kind
    if isinstance(kind, dict):
        own(r, path, kind)
    elif base == "completion":
        r.carry(path, "dataset.format", "text")
        if r.has(*at, "field") and not r.empty(*at, "field"):
            r.carry((*at, "field"), "dataset.columns.text", block["field"])
    elif base in ("chat_template", "sharegpt"):
        r.carry(path, "dataset.format", "messages")
        column = block.get("field_messages") or ("conversations" if base == "sharegpt" else "messages")
        if r.has(*at, "field_messages") and not r.empty(*at, "field_messages"):
            r.carry((*at, "field_messages"), "dataset.columns.messages", column)
        elif column != "messages":
            r.carry(path, "dataset.columns.messages", column)
        turns(r, at, block)
        if not r.empty(*at, "chat_template"):
            template(r, (*at, "chat_template"))
        if not whole:
            r.recipe.default("trainer.assistant_only_loss", True, "Axolotl trains the assistant's words alone")
    elif base == "alpaca" and str(kind) in ("alpaca", "alpaca:instruct", "alpaca:chat"):
        made = prompts.ALPACA_CHAT if kind == "alpaca:chat" else prompts.ALPACA
        r.carry(path, "dataset.template", made, prompts.NO_INPUT)
    elif kind is not None and r.has(*path):
        r.leave(path, f"rows of type {kind} are not known here", "write dataset.template.prompt and .completion")
    if r.has("train_on_inputs"):
        if whole and base in ("chat_template", "sharegpt", "completion"):
            r.same(("train_on_inputs",), "the loss is on every token of such rows, as here")
        elif whole:
            r.carry(("train_on_inputs",), "trainer.completion_only_loss", False)
        else:
            r.same(("train_on_inputs",), "prompts are not in the loss, as here")


def turns(r: Reading, at: Key, block: dict[str, Any]) -> None:
    """Names inside a turn: role and content, or from and value, which TRL renames itself."""
    given = block.get("message_property_mappings")
    names = {**given} if isinstance(given, dict) else {}
    for old, new in (("message_field_role", "role"), ("message_field_content", "content")):
        if isinstance(block.get(old), str):
            names[new] = block[old]
    usual = {("role", "role"), ("content", "content"), ("role", "from"), ("content", "value")}
    for name in ("message_property_mappings", "message_field_role", "message_field_content"):
        if r.has(*at, name) and not r.empty(*at, name):
            if all(pair in usual for pair in names.items()):
                r.same((*at, name), "role and content, or from and value, are read by themselves")
                if "from" in names.values():
                    r.recipe.notes.append(
                        "turns with from and value often say human and gpt: the chat template must know these names, "
                        "else rename them to user and assistant in the file"
                    )
            else:
                r.leave((*at, name), "turns hold role and content, or from and value", "rename them in the file")


def own(r: Reading, path: Key, kind: dict[str, Any]) -> None:
    """A prompt of one's own, `format: "{instruction} {input}"`, as the kit's template."""
    columns = {n: kind.get(f"field_{n}") or n for n in ("instruction", "input", "output", "system")}
    text = str(kind.get("format") or "{instruction} {input} ")
    head = (
        str(kind.get("system_format") or "{system}").replace("{system}", str(kind["system_prompt"]))
        if kind.get("system_prompt")
        else ""
    )
    fill = re.compile(r"\{(instruction|input|system)\}")
    text = "".join(
        "{" + columns[part] + "}" if number % 2 else part.replace("{", "{{").replace("}", "}}")
        for number, part in enumerate(fill.split(text))
    )
    prompt = head.replace("{", "{{").replace("}", "}}") + text
    made = {"prompt": prompt, "completion": "{" + columns["output"] + "}"}
    known = {*(f"field_{n}" for n in columns), "format", "system_prompt", "system_format"}
    for name in kind:
        if name in known and r.has(*path, name) and not r.empty(*path, name):
            r.carry((*path, name), "dataset.template", made)
    r.left({"no_input_format": ("one form for every row", "leave empty inputs out of the data")}, *path)


def liger(r: Reading) -> None:
    """Liger's kernels are one switch here."""
    names = [n for n in r.tree if isinstance(n, str) and n.startswith("liger_")]
    for name in names:
        if r.has(name):
            if r.get(name) is True:
                r.carry((name,), "trainer.use_liger_kernel", True)
            else:
                r.same((name,), "off")
