"""TRL's and transformers' own arguments: ScriptArguments, DatasetMixtureConfig, ModelConfig and SFTConfig.

Upstream: trl scripts/utils.py, trainer/model_config.py, scripts/sft.py (1.16); transformers training_args.py (5.23).
"""

from __future__ import annotations

import re
from typing import Any

from kit.errors import KitError
from kit.foreign import other_runs, scripts
from kit.foreign.data_sets import (
    carry_place,
    carry_split,
    carry_split_and_share,
    file_or_place,
    no_place,
    no_share,
    refuse_other_method,
    section_of,
    split_of_share,
)
from kit.foreign.report import Reading
from kit.foreign.scripts import is_on
from kit.foreign.training_arguments import (
    import_dtype,
    import_training_arguments,
    refuse_remote_code,
    write_trainer_defaults,
)

MODEL = {
    "model_name_or_path": "model.name_or_path",
    "attn_implementation": "model.attn_implementation",
}
DATA = {"dataset_config": "dataset.name", "dataset_streaming": "dataset.streaming"}
LORA = {
    "lora_r": "peft.r",
    "lora_alpha": "peft.lora_alpha",
    "lora_dropout": "peft.lora_dropout",
    "lora_target_parameters": "peft.target_parameters",
    "lora_modules_to_save": "peft.modules_to_save",
    "use_rslora": "peft.use_rslora",
    "use_dora": "peft.use_dora",
}
OTHER_TRAINERS = (  # keys that SFTConfig has not, of DPO, ORPO, KTO, CPO, GRPO, RLOO and reward training
    "beta", "rpo_alpha", "max_prompt_length", "max_completion_length", "precompute_ref_log_probs", "reference_free",
    "ref_model_sync_steps", "sync_ref_model", "simpo_gamma", "cpo_alpha", "desirable_weight", "undesirable_weight",
    "num_generations", "reward_funcs", "reward_weights", "center_rewards_coefficient", "kl_coef", "vllm_mode",
)  # fmt: skip
FOUR_BIT = ("load_in_4bit", "use_4bit_quantization", "load_4bit", "use_int4", "use_4bit", *scripts.QUANTIZED_LORA)
EIGHT_BIT = ("load_in_8bit", "use_8bit_quantization", "load_8bit", "use_int8", "use_8bit")
PEFT_DEFAULTS: dict[str, Any] = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": [
    "q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "up_proj", "gate_proj"]}  # fmt: skip  # its examples/sft
LORA_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": None}
BITS = {
    "bnb_4bit_quant_type": "quantization.bnb_4bit_quant_type",
    "use_nested_quant": "quantization.bnb_4bit_use_double_quant",
    "use_bnb_nested_quant": "quantization.bnb_4bit_use_double_quant",
    "bnb_4bit_quant_storage": "quantization.bnb_4bit_quant_storage",
    "bnb_4bit_quant_storage_dtype": "quantization.bnb_4bit_quant_storage",
}


def import_trl(r: Reading) -> None:
    """A TRL or transformers argument file, `trl sft`'s command line, and those of scripts of people's own."""
    task = str(r.get("task_type", default="CAUSAL_LM")).lower()
    if task not in ("causal_lm", "none", "sft", "pretrain", "pretraining", "pt"):
        raise KitError(
            "this is not a supervised fine-tuning run", f"{r.name}: task_type: {task}", "the kit trains SFT"
        )
    if r.has("task_type") and task.startswith("p"):
        r.carry(("task_type",), "dataset.format", "text", "every token of plain text is trained")
    r.mark_defaults({"task_type": "the kit trains causal language models"})
    refuse_other_trainers(r)
    refuse_no_training(r)
    adapter = import_adapter(r)
    four_bit = import_quantization(r)
    scripts.import_own_words(r, adapter, four_bit)
    import_model(r)
    import_dataset(r)
    import_chat_template(r)
    import_training_arguments(r)
    write_trainer_defaults(r, who="transformers" if r.script else "TRL")
    if r.script:
        r.recipe.notes.append(f"{r.script} is a script of its own: only its options are read here, not its code")


def import_model(r: Reading) -> None:
    r.carry_all(MODEL)
    import_revision(r, "model_revision")
    for name in ("dtype", "torch_dtype"):
        if r.has(name) and not r.skip_null(name):
            import_dtype(r, (name,), r.get(name))
    refuse_remote_code(r)
    if not r.script:
        r.recipe.default("model.dtype", "float32", "TRL loads float32 where no dtype is given")


def import_revision(r: Reading, name: str) -> None:
    if r.has(name) and not r.skip_null(name):
        if r.get(name) == "main":
            r.mark_default((name,), "main is what is loaded")
        else:
            r.carry((name,), "model.revision", r.get(name))


def import_dataset(r: Reading) -> None:
    evaluated = r.get("eval_strategy", default=r.get("evaluation_strategy", default="no"))
    several = import_mixture(r)
    if not several and r.has("dataset_name") and not r.skip_null("dataset_name"):
        r.carry(("dataset_name",), "dataset.path", r.get("dataset_name"))
    r.carry_all(DATA)
    if r.has("streaming"):
        r.carry(("streaming",), "dataset.streaming", r.get("streaming"))
    if r.has("test_split_size") and not r.skip_null("test_split_size"):
        r.carry(("test_split_size",), "dataset.test_size", r.get("test_split_size"))
    if r.has("dataset_train_split") and several:
        r.mark_default(("dataset_train_split",), "each set names its split")
    elif r.has("dataset_train_split"):
        r.carry(("dataset_train_split",), "dataset.split", r.get("dataset_train_split") or "train")
    on = evaluated not in ("no", False, None)
    if r.has("dataset_test_split"):
        if not on:
            r.mark_default(("dataset_test_split",), "not read: nothing is evaluated")
        elif "dataset.test_size" in r.recipe.values:
            r.mark_default(("dataset_test_split",), "the rows held out serve")
        elif any(key.startswith("dataset.mix.") for key in r.recipe.values):
            r.leave(("dataset_test_split",), "NOT carried: a split of several sets", "dataset.test_size=0.05")
        else:
            r.carry(("dataset_test_split",), "dataset.eval_split", r.get("dataset_test_split"))
    elif on and not {"dataset.test_size", "dataset.eval_split", "dataset.mix.0.path"} & set(r.recipe.values):
        r.recipe.default("dataset.eval_split", "test", "TRL evaluates on the split named test")
    text = r.get("dataset_text_field")
    if r.has("dataset_text_field") and not r.skip_null("dataset_text_field"):
        if text == "text":
            r.mark_default(("dataset_text_field",), "the column text is found by itself")
        elif sets := sorted({k.rpartition(".")[0] for k in r.recipe.values if re.match(r"dataset\.mix\.\d+\.", k)}):
            for to in sets:
                r.carry(("dataset_text_field",), f"{to}.columns.text", text)
        else:
            r.carry(("dataset_text_field",), "dataset.columns.text", text)


def import_mixture(r: Reading) -> bool:
    """`datasets` of TRL, `dataset_mixture` and `dataset_mixer` of the alignment handbook; whether one is given."""
    listed, mixture, mixer = r.get("datasets"), r.get("dataset_mixture"), r.get("dataset_mixer")
    if isinstance(mixture, dict) and isinstance(mixture.get("datasets"), list):
        import_handbook_mixture(r, mixture["datasets"])
    elif isinstance(mixer, dict) and mixer:
        import_handbook_mixer(r, mixer)
    elif isinstance(listed, list) and any(isinstance(block, dict) for block in listed):
        import_trl_mixture(r, listed)
    else:
        return False
    for name in ("dataset_name", "dataset_config"):
        if r.has(name) and not r.skip_null(name):
            r.leave((name,), "several data sets are given, and those are read", "")
    return True


def import_trl_mixture(r: Reading, listed: list[Any]) -> None:
    """Shares are of the rows that come out and no set is taken twice: weights, until the first set is exhausted."""
    carried = {}
    for number, block in enumerate(listed):
        if isinstance(block, dict) and file_or_place(block) is not None:
            carried[("datasets", number)] = block
        elif r.has("datasets", number):
            reason, fix = no_place(block if isinstance(block, dict) else {})
            r.leave(("datasets", number), f"NOT carried: {reason}", fix)
    for number, (prefix, block) in enumerate(carried.items()):
        to = section_of(number, len(carried))
        carry_place(r, prefix, block, to)
        carry_split(r, (*prefix, "split"), to)
        if r.has(*prefix, "columns"):
            r.mark_default((*prefix, "columns"), "only the columns that training needs are kept")
        if r.has(*prefix, "fraction") and not r.skip_null(*prefix, "fraction"):
            if len(carried) == 1:
                r.mark_default((*prefix, "fraction"), "a share of one data set is all of it")
            else:
                r.carry((*prefix, "fraction"), f"{to}.weight", block["fraction"], "drawn at random")


def import_handbook_mixture(r: Reading, listed: list[Any]) -> None:
    carried = {}
    for number, block in enumerate(listed):
        prefix = ("dataset_mixture", "datasets", number)
        if not isinstance(block, dict) or not isinstance(block.get("id"), str):
            if r.has(*prefix):
                r.leave(prefix, "NOT carried: it has no id", "dataset.path=FILE")
        elif split_of_share(str(block.get("split") or "train"), block.get("weight")) is None:
            r.leave(prefix, *no_share(block.get("weight")))
        else:
            carried[prefix] = block
    for number, (prefix, block) in enumerate(carried.items()):
        to = section_of(number, len(carried))
        r.carry((*prefix, "id"), f"{to}.path", block["id"])
        r.carry_all({"config": f"{to}.name"}, *prefix)
        carry_split_and_share(r, prefix, to)
        if r.has(*prefix, "columns"):
            r.mark_default((*prefix, "columns"), "only the columns that training needs are kept")
    r.carry_all({"seed": "dataset.seed"}, "dataset_mixture")
    if r.has("dataset_mixture", "test_split_size") and not r.skip_null("dataset_mixture", "test_split_size"):
        r.carry(
            ("dataset_mixture", "test_split_size"), "dataset.test_size", r.get("dataset_mixture", "test_split_size")
        )


def import_handbook_mixer(r: Reading, mixer: dict[Any, Any]) -> None:
    """The handbook's older form: {id: share}, with the splits of all of them beside it."""
    splits = r.get("dataset_splits")
    splits = [str(s) for s in splits] if isinstance(splits, list) else ["train", "test"]
    train = next((s for s in splits if "train" in s), "train")
    names = r.get("dataset_configs")
    names = names if isinstance(names, list) and len(names) == len(mixer) else []
    carried = []
    for place, share in mixer.items():
        if split_of_share(train, share) is None and not is_count(share):
            if r.has("dataset_mixer", place):
                r.leave(("dataset_mixer", place), *no_share(share))
        elif r.has("dataset_mixer", place):
            carried.append(place)
    for number, place in enumerate(carried):
        to, path = section_of(number, len(carried)), ("dataset_mixer", place)
        r.carry(path, f"{to}.path", str(place))
        if is_count(mixer[place]):
            r.carry(path, f"{to}.limit", mixer[place], "so many rows, the first ones")
        if (part := train if is_count(mixer[place]) else split_of_share(train, mixer[place])) != "train":
            r.carry(path, f"{to}.split", part)
        if names:
            r.carry(("dataset_configs",), f"{to}.name", str(names[list(mixer).index(place)]))
    if r.has("dataset_splits"):
        test = [s for s in splits if "test" in s]
        if test and len(mixer) == 1 and r.get("eval_strategy", default="no") not in ("no", False, None):
            r.carry(("dataset_splits",), "dataset.eval_split", test[0])
        elif test and len(mixer) > 1:
            r.leave(("dataset_splits",), f"NOT carried: {', '.join(test)} of several sets", "dataset.test_size=0.05")
        else:
            r.mark_default(("dataset_splits",), "the rows that are trained on are taken")


def is_count(share: Any) -> bool:
    """Tell whether a share is a number of rows, as open-instruct has it."""
    return isinstance(share, int) and not isinstance(share, bool) and share > 1


def import_chat_template(r: Reading) -> None:
    """The handbook's chat_template: Jinja itself, a file, or a name."""
    if not r.has("chat_template") or r.skip_null("chat_template"):
        return
    template = str(r.get("chat_template"))
    if "{" in template or "\n" in template:
        fix = "write it to my.jinja; tokenizer.chat_template=my.jinja"
        r.leave(("chat_template",), "a template is a file here", fix)
    else:
        r.carry(("chat_template",), "tokenizer.chat_template", template)


def refuse_other_trainers(r: Reading) -> None:
    """Refuse the keys that only trainers on preferences, rewards and generations have."""
    for name in OTHER_TRAINERS:
        if r.get(name) not in (None, False):
            refuse_other_method(r, f"{name} belongs to another trainer (DPO, ORPO, KTO, GRPO, rewards)", name)
    if isinstance(r.get("loss_type"), str) and r.get("loss_type") not in ("nll", "dft", "chunked_nll"):
        refuse_other_method(r, f"loss_type {r.get('loss_type')} is of another trainer", "loss_type")
    if other := other_runs.describe_keys(r.tree):
        refuse_other_method(r, *other)
    for name in ("model_name_or_path", *scripts.NAMES["model.name_or_path"].split()):
        if what := other_runs.describe_model(r.get(name)):
            refuse_other_method(r, what, name)
    mixture = r.get("dataset_mixture")
    blocks = mixture.get("datasets") if isinstance(mixture, dict) else r.get("datasets")
    for block in blocks if isinstance(blocks, list) else []:
        columns = block.get("columns") if isinstance(block, dict) else None
        if isinstance(columns, list) and {"chosen", "rejected"} & {str(c) for c in columns}:
            refuse_other_method(r, "the rows are preferences (chosen, rejected)", "columns")


def refuse_no_training(r: Reading) -> None:
    """Refuse a run that only evaluates or writes."""
    predicts = is_on(r.get("do_predict")) and not is_on(r.get("do_train"))
    if predicts or ("do_train" in r.tree and not is_on(r.get("do_train"))):
        raise KitError("this run does not train", f"{r.name}: do_train", "kit eval RUN, or do_train: true")


def import_adapter(r: Reading) -> bool:
    """Choose LoRA or none, carry its settings, and tell whether an adapter is trained."""
    own = scripts.adapter_switches(r)
    switches = ["use_peft", *own] if "use_peft" in r.tree or not own else own
    known = bool(r.script) or "lora_rank" in r.tree or "lora_dim" in r.tree  # TRL's own name is lora_r
    rank_alone = known and "use_peft" not in r.tree and not own and scripts.trains_adapter(r)
    on = rank_alone or any(is_on(r.get(name)) for name in switches)
    for name in switches:
        if r.has(name):
            r.choose_group((name,), "peft", "lora" if on else "none")
    if rank_alone:
        r.recipe.notes.append(f"{r.script or r.name} gives a LoRA rank and no switch: an adapter is trained")
    elif "peft" not in r.recipe.groups:
        r.recipe.groups["peft"] = "none"
        r.recipe.their_defaults["peft=none"] = "TRL trains every weight where use_peft is not given"
    if not on:
        r.mark_defaults(dict.fromkeys([*LORA, "lora_target_modules", "lora_task_type"], "not read: use_peft is off"))
        return False
    r.carry_all(LORA)
    if r.has("lora_target_modules") and not r.skip_null("lora_target_modules"):
        named = r.get("lora_target_modules")
        named = "all-linear" if named in (["all-linear"], ["all"], "all") else named
        if isinstance(named, str) and "," in named and (own or r.script):  # a list there, by the script itself
            named = scripts.list_of_modules(named)
        r.carry(("lora_target_modules",), "peft.target_modules", named)
    if r.has("lora_task_type"):
        if r.get("lora_task_type") in ("CAUSAL_LM", None):
            r.mark_default(("lora_task_type",), "the kit trains causal language models")
        else:
            r.leave(("lora_task_type",), "the kit trains causal language models", "")
    if switches == ["use_peft"] and not rank_alone:
        theirs, who = LORA_DEFAULTS, "TRL"
    elif own == ["use_peft_lora"]:
        theirs, who = PEFT_DEFAULTS, "PEFT's example"
    else:
        theirs, who = {}, ""
        r.recipe.notes.append("what the script's LoRA is where no option says it is in its code: the kit's own stands")
    given = {"r": "lora_rank", "target_modules": "lora_target"}  # read with the script's own words, later
    for name, value in theirs.items():
        if given.get(name) not in r.tree:
            r.recipe.default(f"peft.{name}", value, f"{who}'s default")
    return True


def import_quantization(r: Reading) -> bool:
    """Choose the quantization of the base; tell whether it is 4 bits."""
    bits = scripts.bits_of(r)
    four, eight = (any(is_on(r.get(k)) for k in names) for names in (FOUR_BIT, EIGHT_BIT))
    four, eight = four or bits == "4", eight or bits == "8"
    for name in scripts.BITS:
        if r.has(name) and not r.skip_null(name):
            if bits in ("4", "8"):
                r.choose_group((name,), "quantization", "nf4" if four else "int8")
            elif bits in ("16", "32", "none", "false"):
                r.mark_default((name,), "not quantized, as here")
    for name, on, group in (
        *((name, four and is_on(r.get(name)), "nf4") for name in FOUR_BIT),
        *((name, eight and not four and is_on(r.get(name)), "int8") for name in EIGHT_BIT),
    ):
        if name in scripts.QUANTIZED_LORA and (name,) in r.entries:
            if on:  # the switch of the adapter too
                r.choose_group((name,), "quantization", group)
        elif r.has(name):
            if on:
                r.choose_group((name,), "quantization", group)
            else:
                r.mark_default((name,), "off, as here" if not r.get(name) else "load_in_4bit is read first")
    if not four:
        r.mark_defaults(dict.fromkeys(BITS, "not read: load_in_4bit is off"))
        return False
    r.carry_all(BITS)
    if "double_quant" not in r.tree and "use_double_quant" not in r.tree:
        r.recipe.default("quantization.bnb_4bit_use_double_quant", False, "TRL's default")
    return True
