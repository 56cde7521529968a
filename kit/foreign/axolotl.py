"""An Axolotl YAML. Upstream: axolotl utils/schemas/*.py, core/builders/base.py, prompters.py (July 2026)."""

from __future__ import annotations

from typing import Any

from kit.errors import KitError
from kit.foreign import sharding, trl
from kit.foreign.axolotl_data import import_chat_template, import_datasets, refuse_other_rows
from kit.foreign.axolotl_keys import (
    CUSTOM_OPTIMIZERS,
    NAMES,
    NO_COUNTERPART,
    NOT_SFT,
    NOTHING_NEEDED,
    PEFT,
    THEIR_DEFAULTS,
    TRAINING_ARGUMENTS,
)
from kit.foreign.report import Reading
from kit.foreign.training_arguments import import_training_arguments, write_trainer_defaults


def import_axolotl(r: Reading) -> None:
    for name in NOT_SFT:
        if r.get(name):
            raise KitError(
                f"{name}: {r.get(name)} is no supervised fine-tuning run", r.name, "the kit trains SFT alone"
            )
        r.leave_all({name: ("", "")})
    refuse_other_rows(r)
    import_optimizer(r)
    import_method(r)
    import_attention(r)
    import_precision(r)
    import_steps(r)
    import_trackers(r)
    import_tokens(r)
    import_datasets(r)
    sharding.import_deepspeed_file(r)
    for name, key in NAMES.items():
        if r.has(name) and not r.skip_null(name):
            r.carry((name,), key, r.get(name))
    trl.import_revision(r, "revision_of_model")
    trl.import_revision(r, "model_revision")
    r.mark_defaults(NOTHING_NEEDED)
    r.leave_all(NO_COUNTERPART)
    import_fsdp_version(r)
    import_liger(r)
    import_training_arguments(r, only=TRAINING_ARGUMENTS)
    changed = dict(THEIR_DEFAULTS)
    if "trainer.per_device_train_batch_size" in r.recipe.values:
        changed["per_device_eval_batch_size"] = r.recipe.values["trainer.per_device_train_batch_size"]
    else:
        changed["per_device_eval_batch_size"] = 1
    changed.pop("learning_rate")
    if r.get("learning_rate") is None:
        r.recipe.notes.append("Axolotl needs a learning_rate and the file has none: the kit's own stands")
        changed["learning_rate"] = 2.0e-4
    write_trainer_defaults(r, changed, "Axolotl")
    if "warmup_steps" not in r.tree and r.get("warmup_ratio") is None:
        r.recipe.notes.append("Axolotl's own warm-up is 3% of the steps and at most 100; the limit is not carried")


def import_optimizer(r: Reading) -> None:
    name = r.get("optimizer")
    if r.has("optimizer") and name in CUSTOM_OPTIMIZERS:
        r.leave(("optimizer",), f"transformers has no optimizer {name}", "trainer.optim=adamw_torch_fused")
    if r.get("lr_scheduler") in ("one_cycle", "rex"):
        r.leave(("lr_scheduler",), "no such schedule here", "trainer.lr_scheduler_type=cosine")
    if r.has("cosine_min_lr_ratio") and not r.skip_null("cosine_min_lr_ratio"):
        ratio = r.get("cosine_min_lr_ratio")
        r.carry(("cosine_min_lr_ratio",), "trainer.lr_scheduler_kwargs", {"min_lr_rate": ratio})
        r.carry(("cosine_min_lr_ratio",), "trainer.lr_scheduler_type", "cosine_with_min_lr")
        if r.has("lr_scheduler"):
            r.mark_default(("lr_scheduler",), "cosine_min_lr_ratio chooses cosine_with_min_lr")
    if isinstance(r.get("optim_args"), dict) and r.has("optim_args"):
        r.carry(("optim_args",), "trainer.optim_args", ",".join(f"{k}={v}" for k, v in r.get("optim_args").items()))


def import_method(r: Reading) -> None:
    adapter = r.get("adapter")
    if adapter not in (None, "", "lora", "qlora"):
        raise KitError(f"adapter: {adapter} is not known here", r.name, "adapter: lora, qlora, or none")
    if r.has("adapter"):
        r.choose_group(("adapter",), "peft", "lora" if adapter else "none")
    else:
        r.recipe.groups["peft"] = "none"
        r.recipe.their_defaults["peft=none"] = "Axolotl trains every weight where adapter is not given"
    for name, group in (("load_in_4bit", "nf4"), ("load_in_8bit", "int8")):
        if r.has(name):
            if r.get(name) is True:
                r.choose_group((name,), "quantization", group)
            else:
                r.mark_default((name,), "off, as here")
    if isinstance(r.get("bnb_config_kwargs"), dict):
        r.carry_all(
            {k: f"quantization.{k}" for k in r.get("bnb_config_kwargs") if isinstance(k, str)}, "bnb_config_kwargs"
        )
    if not adapter:
        r.mark_defaults(dict.fromkeys([*PEFT, "lora_target_modules", "lora_target_linear"], "not read: no adapter"))
        return
    named, linear = r.get("lora_target_modules"), r.get("lora_target_linear") is True
    if r.has("lora_target_linear"):
        if linear:
            r.carry(("lora_target_linear",), "peft.target_modules", "all-linear")
        else:
            r.mark_default(("lora_target_linear",), "off: lora_target_modules says it")
    if r.has("lora_target_modules") and not r.skip_null("lora_target_modules"):
        if linear:
            r.mark_default(("lora_target_modules",), "all linear layers hold these too")
        else:
            r.carry(("lora_target_modules",), "peft.target_modules", named)
    elif not linear:
        r.recipe.default("peft.target_modules", None, "Axolotl leaves the choice to PEFT")
    if isinstance(r.get("peft"), dict) and "loftq_config" in r.get("peft"):
        r.carry(("peft", "loftq_config"), "peft.loftq_config", r.get("peft", "loftq_config"))
        r.carry(("peft", "loftq_config"), "peft.init_lora_weights", "loftq")


def import_attention(r: Reading) -> None:
    kinds = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "flex_attention": "flex_attention",
             "eager_attention": "eager"}  # fmt: skip
    for name, kind in kinds.items():
        if r.has(name):
            if r.get(name) in (True, "auto"):
                r.carry((name,), "model.attn_implementation", kind)
            else:
                r.mark_default((name,), "off: another attention")
    given = r.get("attn_implementation")
    if r.has("attn_implementation") and not r.skip_null("attn_implementation"):
        if given in ("xformers", "sage", "s2", "fp8"):
            r.leave(
                ("attn_implementation",), f"transformers has no {given} attention", "model.attn_implementation=sdpa"
            )
        else:
            r.carry(("attn_implementation",), "model.attn_implementation", given)


def import_precision(r: Reading) -> None:
    for name, flag in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16"), ("float16", "fp16")):
        if r.has(name) and not r.skip_null(name):
            value = r.get(name)
            if value == "full":
                r.carry((name,), "trainer.bf16_full_eval", True, "and the weights are bfloat16")
            elif name in ("bfloat16", "float16") and value is False:
                r.mark_default((name,), "off, as here")
            elif name in ("bfloat16", "float16"):
                r.carry((name,), f"trainer.{flag}", value)
                r.carry((name,), "model.dtype", name)
            else:
                r.carry((name,), f"trainer.{flag}", value)
    if r.has("float32"):
        r.mark_default(("float32",), "bf16 and fp16 say it")
    if r.has("tf32"):
        if r.get("tf32") in (True, False):
            r.carry(("tf32",), "trainer.tf32", r.get("tf32"))
        else:
            r.mark_default(("tf32",), "auto leaves torch's own setting")
    value = r.get("gradient_checkpointing")
    if r.has("gradient_checkpointing") and isinstance(value, str) and value not in ("true", "false"):
        r.carry(("gradient_checkpointing",), "trainer.gradient_checkpointing", True)
        r.carry(("gradient_checkpointing",), "trainer.activation_offloading", True, "to the CPU")
    if r.has("activation_offloading") and isinstance(r.get("activation_offloading"), str):
        r.carry(("activation_offloading",), "trainer.activation_offloading", True, "to the CPU")


def import_steps(r: Reading) -> None:
    total, micro = r.get("batch_size"), r.get("micro_batch_size", default=1)
    if r.has("batch_size") and not r.skip_null("batch_size"):
        if r.get("gradient_accumulation_steps"):
            r.mark_default(("batch_size",), "not read: gradient_accumulation_steps is given")
        elif isinstance(total, int) and isinstance(micro, int) and micro > 0 and total >= micro:
            note = f"{total} rows per process in batches of {micro}"
            r.carry(("batch_size",), "trainer.gradient_accumulation_steps", total // micro, note)
            if r.has("gradient_accumulation_steps"):
                r.mark_default(("gradient_accumulation_steps",), "batch_size says it")
        else:
            r.leave(("batch_size",), "no whole number of micro batches", "trainer.gradient_accumulation_steps=N")
    epochs = r.get("num_epochs", default=1)
    held_out = bool(r.get("val_set_size")) or bool(r.get("test_datasets"))
    for name, key in (("evals_per_epoch", "eval"), ("saves_per_epoch", "save")):
        if not r.has(name) or r.skip_null(name):
            continue
        times = r.get(name)
        if not times or (key == "eval" and not held_out):
            r.mark_default((name,), "nothing is held out to evaluate" if times else "switched off, as here")
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
        if r.has(name) and not r.skip_null(name):
            if key == "eval" and not held_out:
                r.mark_default((name,), "nothing is held out to evaluate")
            else:
                r.carry((name,), f"trainer.{name}", r.get(name))
                r.carry((name,), f"trainer.{key}_strategy", "steps")
                if r.has(f"{key}_strategy"):
                    r.mark_default((f"{key}_strategy",), f"{name} is given")
    for name in ("eval_strategy", "eval_sample_packing"):
        if r.has(name) and not held_out:
            r.mark_default((name,), "nothing is held out to evaluate")
    if r.has("max_steps") and r.get("max_steps") == 0:
        r.mark_default(("max_steps",), "0: the epochs say it")


def import_trackers(r: Reading) -> None:
    for name in ("wandb", "mlflow", "tensorboard", "trackio", "comet"):
        on = r.get(f"use_{name}") is True or bool(r.get(f"{name}_project"))
        if r.has(f"use_{name}"):
            if not r.get(f"use_{name}"):
                r.mark_default((f"use_{name}",), "off, as here")
            elif name == "comet":
                r.carry(("use_comet",), "trainer.report_to", ["comet_ml"])
            else:
                r.choose_group((f"use_{name}",), "tracking", name)
        elif on and name == "wandb":
            r.recipe.groups["tracking"] = "wandb"
            r.recipe.their_defaults["tracking=wandb"] = "Axolotl reports to wandb where wandb_project is given"
    for name in ("wandb_name", "mlflow_run_name", "trackio_run_name"):
        if r.has(name) and not r.get(name):
            r.mark_default((name,), "empty")


def import_tokens(r: Reading) -> None:
    block_key = "special_tokens"
    for key in [k for k in (block_key, "tokens") if isinstance(r.get(k), dict)]:  # tokens: its older name
        names = ("pad_token", "eos_token", "bos_token")
        r.carry_all({n: f"tokenizer.{n}" for n in names}, key)
        r.leave_all(
            {"unk_token": ("the tokenizer's own stands", "a tokenizer of your own: tokenizer.name_or_path")}, key
        )
    if r.has(block_key) and not isinstance(r.get(block_key), dict):
        r.mark_default((block_key,), "empty")
    added: list[Any] = []
    for path in ((block_key, "additional_special_tokens"), ("tokens",)):
        if r.has(*path) and not isinstance(r.get(*path), dict) and not r.skip_null(*path):
            added += r.get(*path) if isinstance(r.get(*path), list) else [r.get(*path)]
            note = "added as special tokens" if path == ("tokens",) else ""
            r.carry(path, "tokenizer.added_tokens", list(added), note)
    import_chat_template(r, ("chat_template",))
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
        r.mark_default(("chat_template_jinja",), "empty")


def import_fsdp_version(r: Reading) -> None:
    """The version at the top, which an FSDP run reads like that in fsdp_config."""
    if r.has("fsdp_version") and not r.skip_null("fsdp_version"):
        if r.get("fsdp") or r.get("fsdp_config"):
            r.carry(("fsdp_version",), "fsdp.version", r.get("fsdp_version"))
        else:
            r.mark_default(("fsdp_version",), "not read: no fsdp_config")


def import_liger(r: Reading) -> None:
    """Liger's kernels are one switch here."""
    names = [n for n in r.tree if isinstance(n, str) and n.startswith("liger_")]
    for name in names:
        if r.has(name):
            if r.get(name) is True:
                r.carry((name,), "trainer.use_liger_kernel", True)
            else:
                r.mark_default((name,), "off")
