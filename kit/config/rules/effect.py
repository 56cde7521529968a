"""The rules of what a run cannot do as it is typed: settings that nobody reads, methods that need a call nobody makes.

Both are tables: a library takes such a value without a word, and the run is another one than was asked for.
kit/config/rules/table.py lists the rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kit.config.added_tokens import is_tied
from kit.config.rules.context import RuleContext, Violations
from kit.config.rules.trainer import evaluates, holds_out, setting
from kit.schema import fields
from kit.schema.dotted import value_at

# PEFT 0.21: key, the value that asks for it, what it lacks. A None as value: any that is set.
UNPREPARED: tuple[tuple[str, Any, str], ...] = (
    (
        "peft_type",
        "ADALORA",
        "moves ranks in update_and_allocate alone, which nobody calls in a step",
    ),
    ("peft_type", "POLY", "asks every batch for task_ids, which the rows do not hold"),
    ("peft_type", "MULTITASK_PROMPT_TUNING", "asks every batch for task_ids, which the rows do not hold"),
    ("peft_type", "XLORA", "mixes adapters that are trained already, and gives the layers none to train"),
    ("peft_type", "CPT", "computes a loss of its own from logits, which TRL's fused loss never makes"),
    ("peft_type", "ADAPTION_PROMPT", "calls the base past the forward into which TRL has fused its loss"),
    ("peft_type", "RANDLORA", "keeps one pair of matrices for all layers, which the check of a saved adapter misses"),
    ("init_lora_weights", "eva", "needs initialize_lora_eva_weights over the data: without it the start is random"),
    ("init_lora_weights", "corda", "needs preprocess_corda over the data before the adapter is made"),
    ("init_lora_weights", "lora_ga", "needs preprocess_loraga over the data before the adapter is made"),
    ("init_lora_weights", "loftq", "puts a quantized copy in the base's place, which no file of the run holds"),
    ("arrow_config", None, "routes between trained adapters, which create_arrow_model puts together"),
    ("kasa_config", None, "has regularizers that only LoraModel._get_kasa_loss adds to the loss, and nobody calls it"),
    ("monteclora_config", None, "has a loss of its own, LoraModel._get_monteclora_loss, which nobody adds"),
    ("megatron_config", None, "is for layers of Megatron, which transformers' models do not have"),
    ("use_asa", True, "needs AdamssAsaCallback in the trainer, which nobody adds"),
    ("mask_type", "custom", "needs a function (mask_fn), which a configuration cannot hold"),
)


def unprepared(run: RuleContext) -> Violations:
    peft = run.plan["peft"] or {}
    for key, wanted, lack in UNPREPARED:
        value = str(peft.get(key)).upper() if key == "peft_type" else peft.get(key)
        if value == wanted if wanted is not None else value:
            named = f"{key}={value}" if wanted is not None else key
            fix = {"peft_type": "peft.peft_type=LORA", "init_lora_weights": "peft.init_lora_weights=true"}
            yield f"{named} {lack}", f"peft.{key}", fix.get(key, f"leave peft.{key} out")


# transformers trainer_optimizer.py: optimizers that take neither betas nor epsilon from the trainer, and those that
# take betas alone. Compared with the library by tests/config/test_effect.py.
WITHOUT_ADAM = ("adafactor", "sgd", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
                "lomo", "adalomo", "grokadamw", "schedule_free_sgd", "galore_adafactor",
                "galore_adafactor_layerwise")  # fmt: skip
BETAS_ALONE = ("lion_8bit", "lion_32bit", "paged_lion_32bit", "paged_lion_8bit")


def optimizer(run: RuleContext) -> str:
    """The trainer's optimizer; empty where the DeepSpeed JSON has one of its own."""
    return "" if value_at(run.plan["deepspeed"], "optimizer") else str(setting(run, "optim"))


def peft(run: RuleContext, key: str) -> Any:
    return (run.plan["peft"] or {}).get(key)


def bits(run: RuleContext, key: str) -> bool:
    return bool((run.plan["quantization"] or {}).get(key))


# (keys, whether they are read by nobody, what stands against them, what to do).
NO_EFFECT: tuple[tuple[str, Callable[[RuleContext], bool], str, str], ...] = (
    ("peft.eva_config", lambda run: peft(run, "init_lora_weights") != "eva", "init_lora_weights is not eva", ""),
    ("peft.corda_config", lambda run: peft(run, "init_lora_weights") != "corda", "init_lora_weights is not corda", ""),
    ("peft.lora_ga_config", lambda run: peft(run, "init_lora_weights") != "lora_ga",
     "init_lora_weights is not lora_ga", ""),
    ("peft.loftq_config", lambda run: peft(run, "init_lora_weights") != "loftq", "init_lora_weights is not loftq", ""),
    ("peft.qalora_group_size", lambda run: not peft(run, "use_qalora"), "use_qalora is false", "peft.use_qalora=true"),
    ("peft.megatron_core", lambda run: not peft(run, "megatron_config"), "there is no megatron_config", ""),
    ("peft.asa_target_subspaces peft.init_warmup peft.final_warmup peft.mask_interval peft.asa_importance_beta"
     " peft.asa_uncertainty_beta peft.asa_schedule_exponent", lambda run: not peft(run, "use_asa"),
     "use_asa is false", ""),
    ("peft.svd_threshold", lambda run: not peft(run, "use_dynamic_rank"), "use_dynamic_rank is false",
     "peft.use_dynamic_rank=true"),
    ("peft.encoder_hidden_size", lambda run: peft(run, "peft_type") == "PREFIX_TUNING"
     and not peft(run, "prefix_projection"), "prefix_projection is false", "peft.prefix_projection=true"),
    ("peft.encoder_num_layers peft.encoder_dropout", lambda run: peft(run, "peft_type") == "P_TUNING"
     and peft(run, "encoder_reparameterization_type") != "LSTM", "the encoder is an MLP, which has two layers",
     "peft.encoder_reparameterization_type=LSTM"),
    ("peft.prompt_tuning_init_text peft.tokenizer_name_or_path peft.tokenizer_kwargs",
     lambda run: peft(run, "prompt_tuning_init") != "TEXT", "prompt_tuning_init is not TEXT",
     "peft.prompt_tuning_init=TEXT"),
    ("peft.rank_dropout_scale", lambda run: not peft(run, "rank_dropout"), "rank_dropout is 0", ""),
    ("peft.num_cayley_neumann_terms", lambda run: peft(run, "use_cayley_neumann") is False,
     "use_cayley_neumann is false", "peft.use_cayley_neumann=true"),
    ("peft.eps", lambda run: peft(run, "peft_type") == "OFT" and not peft(run, "coft"), "coft is false",
     "peft.coft=true"),
    ("peft.ensure_weight_tying", lambda run: is_tied(run.base) is False, "the base's embeddings are not tied", ""),
    ("quantization.bnb_4bit_quant_type quantization.bnb_4bit_compute_dtype quantization.bnb_4bit_use_double_quant"
     " quantization.bnb_4bit_quant_storage", lambda run: bits(run, "load_in_8bit"), "the base is loaded in 8 bits",
     "quantization=nf4"),
    ("quantization.llm_int8_threshold quantization.llm_int8_has_fp16_weight",
     lambda run: bits(run, "load_in_4bit"), "the base is loaded in 4 bits", "quantization=int8"),
    ("trainer.adam_beta1 trainer.adam_beta2 trainer.adam_epsilon", lambda run: optimizer(run) in WITHOUT_ADAM,
     "the optimizer {optim} does not take it", "trainer.optim=adamw_torch"),
    ("trainer.adam_epsilon", lambda run: optimizer(run) in BETAS_ALONE, "the optimizer {optim} does not take it",
     "trainer.optim=adamw_torch"),
    ("trainer.dataset_kwargs", lambda run: True, "the kit prepares the rows itself, and TRL's preparation is off",
     "dataset.format, dataset.columns and dataset.train_on say how rows are read"),
    ("trainer.packing_strategy", lambda run: not (setting(run, "packing") or run.plan["trainer"].get("eval_packing")),
     "packing is false", "trainer.packing=true"),
    ("trainer.eval_packing", lambda run: not (evaluates(run) or holds_out(run)), "nothing is evaluated",
     "dataset.test_size=0.1"),
    ("dataset.max_bad_rows", lambda run: {run.plan["dataset"][k] for k in ("on_bad_row", "on_long_row")} == {"refuse"},
     "bad rows are refused, and long ones", "dataset.on_bad_row=drop"),
    ("dataset.mix_until", lambda run: not any(s.get("weight") for s in run.plan["dataset"]["mix"]),
     "no set has a weight: all rows are read in turn", "weights in dataset.mix"),
)  # fmt: skip
TABLES = {"trainer": "SFTConfig", "quantization": "BitsAndBytesConfig"}


def no_effect(run: RuleContext) -> Violations:
    for keys, unread, against, fix in NO_EFFECT:
        for key in keys.split():
            if typed(run, key) and differs_from_default(run, key) and unread(run):
                reason = against.format(optim=setting(run, "optim"))
                name, drop = key.partition(".")[2], f"leave {key} out"
                yield f"{name} would have no effect: {reason}", key, f"{fix}, or {drop}" if fix else drop


def typed(run: RuleContext, key: str) -> bool:
    """Whether a recipe, a file or the command line sets a key or one inside it."""
    inside = [k for k in run.report.provenance if k == key or k.startswith(key + ".")]
    return any(run.report.chosen(k) for k in inside)


def differs_from_default(run: RuleContext, key: str) -> bool:
    """Whether the value is another than the library would take by itself. A switch that is off asks for nothing."""
    section, _, name = key.partition(".")
    value = (run.plan[section] or {}).get(name)
    if value is False:
        return False
    if section == "dataset" or value in (None, {}):
        return value not in (None, {})
    table = TABLES.get(section, str(peft(run, "peft_type") or "LORA").upper())
    return bool(value != fields.field_tables().get(table, {}).get(name, {}).get("default"))
