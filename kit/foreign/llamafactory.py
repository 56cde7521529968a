"""A LLaMA-Factory YAML. Upstream: LLaMA-Factory src/llamafactory/hparams/*.py, data/parser.py (August 2026)."""

from __future__ import annotations

from kit.errors import KitError
from kit.foreign import trl
from kit.foreign.llamafactory_data import import_datasets, split_list
from kit.foreign.llamafactory_keys import (
    ATTENTION,
    LORA,
    NAMES,
    NO_COUNTERPART,
    NOTHING_NEEDED,
    PREFIXES,
    THEIR_DEFAULTS,
)
from kit.foreign.report import Reading
from kit.foreign.training_arguments import import_training_arguments, write_trainer_defaults


def import_llamafactory(r: Reading) -> None:
    stage, kind = r.get("stage", default="sft") or "sft", r.get("finetuning_type", default="lora") or "lora"
    if stage not in ("sft", "pt"):
        raise KitError("this is not a supervised fine-tuning run", f"{r.name}: stage: {stage}", "stage: sft, or pt")
    if kind not in ("lora", "full"):
        raise KitError(f"finetuning_type: {kind} is not known here", r.name, "finetuning_type: lora, or full")
    trl.refuse_no_training(r)
    r.mark_defaults({"stage": "every token of plain text is trained" if stage == "pt" else "the kit trains SFT alone"})
    import_method(r, kind)
    import_quantization(r)
    import_tokenizer(r)
    import_datasets(r)
    import_packing(r)
    if stage == "pt":
        r.recipe.default("trainer.packing", True, "LLaMA-Factory packs the rows of stage pt")
        if r.recipe.values.get("trainer.packing"):
            r.recipe.default("dataset.on_long_row", "split", "LLaMA-Factory packs all words of a text")
    import_checkpointing(r)
    r.carry_all(NAMES)
    trl.import_revision(r, "model_revision")
    if r.has("flash_attn") and not r.skip_null("flash_attn"):
        name = r.get("flash_attn")
        name = "disabled" if name is False else name
        if isinstance(name, str) and name in ATTENTION:
            r.carry(("flash_attn",), "model.attn_implementation", ATTENTION[name])
        elif name == "auto":
            r.mark_default(("flash_attn",), "transformers' own choice")
        else:
            r.leave(("flash_attn",), "not known", "model.attn_implementation=sdpa")
    if r.has("use_dft_loss"):
        if r.get("use_dft_loss") is True:
            r.carry(("use_dft_loss",), "trainer.loss_type", "dft")
        else:
            r.mark_default(("use_dft_loss",), "off, as here")
    if r.has("use_swanlab"):
        if r.get("use_swanlab") is True:
            r.carry(("use_swanlab",), "trainer.report_to", ["swanlab"])
        else:
            r.mark_default(("use_swanlab",), "off, as here")
    r.mark_defaults(NOTHING_NEEDED)
    r.leave_all(NO_COUNTERPART)
    mark_unused(r)
    import_training_arguments(r, skip=("max_length",))
    changed = dict(THEIR_DEFAULTS)
    write_trainer_defaults(r, changed, "LLaMA-Factory")
    if "bf16" not in r.tree and "fp16" not in r.tree:
        r.recipe.notes.append(
            "neither bf16 nor fp16 is given: LLaMA-Factory computes in the checkpoint's dtype, the kit in what the "
            "hardware is fast at"
        )


def mark_unused(r: Reading) -> None:
    """Settings of methods that are switched off, by their prefix."""
    for name in list(r.tree):
        prefix = next((p for p in PREFIXES if isinstance(name, str) and name.startswith(p)), None)
        if prefix and r.has(name):
            switch = f"use_{prefix.rstrip('_')}"
            if r.get(switch):
                r.leave((name,), f"see {switch}", "")
            else:
                r.mark_default((name,), f"not read: {PREFIXES[prefix]}")


def import_method(r: Reading, kind: str) -> None:
    if r.has("finetuning_type"):
        r.choose_group(("finetuning_type",), "peft", "lora" if kind == "lora" else "none")
    else:
        r.recipe.groups["peft"] = "lora"
    keys = ["lora_target", "additional_target", "pissa_init", "pissa_iter", "adapter_name_or_path"]
    if kind == "full":
        r.mark_defaults(dict.fromkeys([*LORA, *keys], "not read: finetuning_type is full"))
        return
    if r.has("lora_alpha") and r.get("lora_alpha") is None:
        r.mark_default(("lora_alpha",), "null: twice the rank")
    r.carry_all(LORA)
    if r.has("lora_target") and not r.skip_null("lora_target"):
        named = split_list(r.get("lora_target"))
        r.carry(("lora_target",), "peft.target_modules", "all-linear" if named == ["all"] else named)
    if r.has("additional_target") and not r.skip_null("additional_target"):
        r.carry(("additional_target",), "peft.modules_to_save", split_list(r.get("additional_target")))
    steps = r.get("pissa_iter", default=16)
    if r.has("pissa_init"):
        if r.get("pissa_init") is True:
            init = "pissa" if steps == -1 else f"pissa_niter_{steps}"
            r.carry(("pissa_init",), "peft.init_lora_weights", init)
        else:
            r.mark_default(("pissa_init",), "off, as here")
    if r.has("pissa_iter"):
        r.mark_default(("pissa_iter",), "pissa_init says it" if r.get("pissa_init") else "not read: pissa_init is off")
    if r.has("adapter_name_or_path") and not r.skip_null("adapter_name_or_path"):
        named = split_list(r.get("adapter_name_or_path"))
        if len(named) == 1:
            r.carry(("adapter_name_or_path",), "peft.init_from", named[0])
        else:
            r.leave(("adapter_name_or_path",), "a run starts from one adapter", "kit merge the others first")
    rank = r.recipe.values.get("peft.r", 8)
    r.recipe.default("peft.r", 8, "LLaMA-Factory's default")
    if isinstance(rank, int):
        r.recipe.default("peft.lora_alpha", 2 * rank, "LLaMA-Factory's default, twice the rank")


def import_quantization(r: Reading) -> None:
    bits = r.get("quantization_bit")
    if r.has("quantization_method"):
        if str(r.get("quantization_method")) in ("bnb", "bitsandbytes") or bits is None:
            r.mark_default(("quantization_method",), "bitsandbytes, as here")
        else:
            raise KitError(f"quantization_method: {r.get('quantization_method')} is not known here", r.name, "bnb")
    if r.has("quantization_bit") and not r.skip_null("quantization_bit"):
        if bits not in (4, 8):
            raise KitError(f"quantization_bit: {bits} is not known here", r.name, "4 or 8")
        r.choose_group(("quantization_bit",), "quantization", "nf4" if bits == 4 else "int8")
    if bits == 4:
        r.carry_all({"quantization_type": "quantization.bnb_4bit_quant_type",
                 "double_quantization": "quantization.bnb_4bit_use_double_quant"})  # fmt: skip
    else:
        r.mark_defaults(dict.fromkeys(["quantization_type", "double_quantization"], "not read: no 4 bits"))


def import_tokenizer(r: Reading) -> None:
    if r.has("template") and not r.skip_null("template"):
        name = r.get("template")
        if name == "chatml":
            r.carry(("template",), "tokenizer.chat_template", "chatml")
        else:
            r.leave(("template",), f"the tokenizer's own template is used; that {name} writes the same is not known",
                    "compare one row; tokenizer.chat_template=NAME or FILE.jinja")  # fmt: skip
    added: list[str] = []
    for name, note in (("add_special_tokens", ""), ("add_tokens", "added as special tokens")):
        if r.has(name) and not r.skip_null(name):
            added += split_list(r.get(name))
            r.carry((name,), "tokenizer.added_tokens", list(added), note)


def import_packing(r: Reading) -> None:
    neat = r.get("neat_packing") is True
    if r.has("neat_packing"):
        if neat:
            r.carry(("neat_packing",), "trainer.packing", True)
        else:
            r.mark_default(("neat_packing",), "off: packing says it")
    if r.has("packing") and not r.skip_null("packing"):
        on = r.get("packing") is True
        if neat:
            r.mark_default(("packing",), "neat_packing says it")
        else:
            r.carry(("packing",), "trainer.packing", on, "rows of one pack never see each other here" if on else "")


def import_checkpointing(r: Reading) -> None:
    off = r.get("disable_gradient_checkpointing") is True
    if r.has("disable_gradient_checkpointing"):
        r.carry(("disable_gradient_checkpointing",), "trainer.gradient_checkpointing", not off)
        if r.has("gradient_checkpointing"):
            r.mark_default(("gradient_checkpointing",), "disable_gradient_checkpointing says it")
    if r.has("use_reentrant_gc"):
        key = "trainer.gradient_checkpointing_kwargs"
        r.carry(("use_reentrant_gc",), key, {"use_reentrant": r.get("use_reentrant_gc")})
