"""The base model and its tokenizer, loaded as the plan says."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging

from kit.errors import KitError, first_line
from kit.inspection.attention import ATTENTION, FLEX
from kit.inspection.tokenizer import find_chat_template
from kit.models import attention
from kit.models.open import embedding_row_count, open_base
from kit.schema.dotted import value_at
from kit.schema.run_plan import RunPlan

logger = logging.get_logger(__name__)


def load_tokenizer(plan: RunPlan) -> Any:
    """The tokenizer with pad, eos and chat template set knowingly; KitError where there is no pad or eos token."""
    t = plan.tokenizer
    name = t.name_or_path or plan.model.name_or_path
    revision = t.revision or (plan.model.revision if t.name_or_path is None else None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=plan.model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        fix = "tokenizer.name_or_path=FOLDER or Hub id, of a tokenizer with the same vocabulary"
        raise KitError(f"{name} has no tokenizer: {first_line(error)}", "tokenizer.name_or_path", fix) from error
    keep_bos_setting(tokenizer, name, revision)
    if t.added_tokens:
        tokenizer.add_tokens([AddedToken(a, special=True, normalized=False) for a in t.added_tokens], True)
    for key in ("pad_token", "eos_token", "bos_token"):
        if token := getattr(t, key):
            if token not in tokenizer.get_vocab():
                raise KitError(f"{token!r} is not in the vocabulary", f"tokenizer.{key}", "name a token that exists")
            setattr(tokenizer, key, token)
    if tokenizer.eos_token is None:
        raise KitError(f"{name} has no end token: a tuned model would never stop", "tokenizer.eos_token", "name one")
    if tokenizer.pad_token is None:
        raise KitError(
            f"{name} has no padding token",
            "tokenizer.pad_token",
            "name one that the data never holds, e.g. a reserved token",
        )
    if t.chat_template:
        tokenizer.chat_template = find_chat_template(t.chat_template).read_text(encoding="utf-8")
    tokenizer.padding_side = "right"
    return tokenizer


def keep_bos_setting(tokenizer: Any, name: str, revision: str | None) -> None:
    """Put back the add_bos_token of tokenizer_config.json, which transformers 5 drops beside a tokenizer.json.

    DeepSeek V3's says true and its tokenizer.json adds none; encode.fit_bos does what the setting says.
    """
    if tokenizer.bos_token is not None and get_tokenizer_config(name, revision=revision).get("add_bos_token") is True:
        tokenizer.add_bos_token = True


def load_model(plan: RunPlan, tokenizer: Any) -> Any:
    """The base model, its embeddings grown where tokens were added.

    Under ZeRO-3 its weights arrive sharded, provided that SFTConfig was built before. A quantized base is loaded
    whole by every rank, tensor by tensor onto its own device, and sharded later (peft#2016): without a device_map
    transformers takes the current GPU, which SFTConfig has set to this rank's.
    """
    m = plan.model
    common: dict[str, Any] = {"revision": m.revision, "trust_remote_code": m.trust_remote_code}
    kwargs = base_load_arguments(plan)
    try:
        if m.random_init:
            config = AutoConfig.from_pretrained(m.name_or_path, **common)
            model = AutoModelForCausalLM.from_config(config, **kwargs, trust_remote_code=m.trust_remote_code)
        else:
            model = open_base(
                m.name_or_path,
                quantization=plan.quantization,
                keep_deepspeed=bool(plan.deepspeed),
                **common,
                **kwargs,
            )
    except (OSError, ValueError) as error:
        fix = "check the folder, or fetch it again: kit fetch; kit doctor looks at the machine"
        raise KitError(f"{m.name_or_path} cannot be loaded: {first_line(error)}", "model.name_or_path", fix) from error
    if plan.zero_stage == 3 and not plan.quantization and not hasattr(next(model.parameters()), "ds_id"):
        problem = "ZeRO-3 is chosen, but the weights were not sharded while loading"
        raise KitError(problem, "deepspeed", "deepspeed=zero2, or a transformers that kit doctor names", code=4)
    fit_embeddings(model, tokenizer, added=bool(plan.tokenizer.added_tokens))
    whole = plan.zero_stage != 3 and not plan.fsdp and not plan.quantization
    if whole and not plan.trainer["use_cpu"] and torch.cuda.is_available():
        model = model.to("cuda")  # PEFT makes the adapter where its base lies: 448 matrices took 9 s on host memory
    return model


def base_load_arguments(plan: RunPlan) -> dict[str, Any]:
    """How the base is loaded: `trainer.model_init_kwargs`, dtype and attention."""
    kwargs = {**(plan.trainer.get("model_init_kwargs") or {}), "dtype": getattr(torch, plan.model.dtype)}
    if plan.model.attn_implementation not in (None, "auto"):
        kwargs["attn_implementation"] = plan.model.attn_implementation
    if kwargs.get("attn_implementation") in (ATTENTION, FLEX):
        attention.register()
    return kwargs


def fit_embeddings(model: Any, tokenizer: Any, added: bool) -> None:
    """A row for every token: embeddings grow where tokens were `added`, and never shrink. Collective under ZeRO-3.

    KitError where other tokens of the tokenizer have no row; special ones that no text need hold are only named.
    """
    rows = embedding_row_count(model)
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if beyond and added:
        model.resize_token_embeddings(max(beyond.values()) + 1)  # new rows are drawn around the mean of the old ones
        return
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    used = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    if lost := sorted(token for token, i in beyond.items() if i not in special or i in used):
        raise KitError(
            f"the tokenizer reaches id {max(beyond.values())}, the model's embedding has {rows} rows: "
            f"{', '.join(map(repr, lost[:3]))} would have none",
            "tokenizer.name_or_path",
            "use the tokenizer that belongs to the model, or list the tokens in tokenizer.added_tokens",
        )
    if beyond:
        logger.warning(f"no row in the embedding for {', '.join(sorted(beyond)[:3])}: data must not hold them")


def check_added_tokens_train(model: Any, plan: RunPlan) -> None:
    """KitError where tokens were added and an embedding at either end would stay as it was drawn."""
    if not plan.tokenizer.added_tokens or plan.peft is None or not plan.peft.get("modules_to_save"):
        return
    for end, layer in (("input", model.get_input_embeddings()), ("output", model.get_output_embeddings())):
        if not layer.weight.requires_grad:
            raise KitError(
                f"tokens are added, but {plan.peft['modules_to_save']} lacks the {end} embedding: it would not train",
                "peft.modules_to_save",
                "name the modules of both embeddings",
            )


def load_peft_config(plan: RunPlan) -> Any:
    """The PEFT config of the plan, None for full fine-tuning."""
    if plan.peft is None:
        return None
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    values = dict(plan.peft)
    kind = PeftType(values.pop("peft_type", "LORA").upper())
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**values)
    except (TypeError, ValueError) as error:
        fix = "change or leave out the setting that it names: kit why peft"
        raise KitError(f"PEFT refuses the adapter: {first_line(error)}", "peft", fix) from error


def prepare_leaf_modules(model: Any, plan: RunPlan) -> None:
    """Make the modules that ZeRO-3 gathers whole fit to train an adapter; KitError where none of them is in the model.

    DeepSpeed reduces the gradients of a leaf module in its full backward hook, which PyTorch calls before the module's
    backward where no input requires a gradient: with a frozen embedding and without checkpointing the first layer
    would reduce zeros, and be freed before its backward (DeepSpeed#5008, stage3.py).
    """
    if plan.zero_stage != 3:
        return
    classes = value_at(plan.deepspeed, "zero_optimization.leaf_module.classes") or []
    found = {
        name for m in model.modules() for name in (type(m).__name__, f"{type(m).__module__}.{type(m).__qualname__}")
    }
    if classes and not found & set(classes):  # DeepSpeed says so in its log, and gathers each module by itself
        key = "deepspeed.zero_optimization.leaf_module.classes"
        layers = sorted(
            {type(m[0]).__name__ for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m)}
        )
        fix = f"{key}=[{','.join(layers)}], the classes that the model repeats; or leave it out"
        raise KitError(f"no module of the model is one of {classes}", key, fix)
    if plan.peft is not None:
        model.get_base_model().enable_input_require_grads()


def restore_adapter_dtype(model: Any, plan: RunPlan) -> None:
    """Give the adapter of a quantized base float32 back where the run does not compute in bfloat16.

    TRL makes it bfloat16 whatever the precision (peft#2889): plain optimizers would lose small updates, fp16's
    gradient scaling expects float32, ZeRO-3 gathers one dtype only (DeepSpeed#8072). DeepSpeed makes fp16 adapters
    itself.
    """
    if plan.quantization and (plan.precision == "float32" or (plan.precision == "float16" and not plan.deepspeed)):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
