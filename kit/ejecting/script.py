"""train.py: the script from top to bottom, as kit/training/run.py goes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kit.ejecting.data import data_lines, held_out_lines
from kit.ejecting.text import WIDTH, assignment_lines, call_lines, keyword_arguments, literal
from kit.errors import KitError
from kit.inspection.attention import ATTENTION, FLEX
from kit.schema import fields, trackers
from kit.schema.dotted import value_at
from kit.schema.run_plan import RunPlan
from kit.storage import run_directory

SCRIPT, JSON, START, TEMPLATE = "train.py", "ds_config.json", "run.sh", "chat_template.jinja"
MAX_LINES = 80  # lines of Python that a person reads


def render_script(plan: RunPlan) -> str:
    """train.py: an argument to a line, or several where it would pass MOST lines; KitError where it still does."""
    count = 0
    for packed in (False, True):
        lines = script_lines(plan, packed)
        if (count := len(lines)) <= MAX_LINES:
            return "\n".join(f"{x}  # noqa: E501" if len(x) > WIDTH else x for x in lines) + "\n"
    raise KitError(
        f"the script would have {count} lines, more than {MAX_LINES}: nobody would read it",
        "eject",
        "leave out what the run does not need: kit diff names what differs from a recipe",
    )


def script_lines(plan: RunPlan, packed: bool) -> list[str]:
    """The script from top to bottom, as kit/training/run.py goes."""
    cpu, ds, full = plan.trainer["use_cpu"], plan.deepspeed, plan.peft is None
    name = re.sub(r'["\\\\]', "", plan.name)
    head = [f'"""{name} as a plain TRL script, by `kit eject`. Start it with ./{START}, in this folder.', ""]
    head += [
        "It trains what the plan trains. The kit's guards are not in it: complete-or-absent saves with a manifest,"
    ]
    head += ["a stop at a signal that can be resumed, and an end where the loss is no longer finite.", '"""', ""]
    body: list[str] = []
    if ds and cpu:
        body += ["# zero.Init asks DeepSpeed for the number of processes, on a CPU before the trainer has set it up."]
        body += ['deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)', ""]
    if ds:
        body.append("# Before the model, and kept: from_pretrained looks for the DeepSpeed config that this holds.")
    body += call_lines("args = SFTConfig(", training_argument_lines(plan), packed)
    body += ["set_seed(args.seed)  # before anything is drawn: new weights, new rows of embeddings, the adapter", ""]
    body += [*tokenizer_lines(plan), "", *data_lines(plan, packed), "", *model_lines(plan, packed)]
    given = ["model=model", "args=args", "train_dataset=train"]
    given += ["eval_dataset=validation"] if held_out_lines(plan.dataset) else []
    given += ["processing_class=tokenizer"]
    if not full:
        body += call_lines(*adapter_lines(plan), packed)
        given.append("peft_config=adapter")
    body += call_lines("trainer = SFTTrainer(", given, packed)
    if plan.init_from:
        path = str(Path(plan.init_from.path) / str(plan.init_from.weights))
        body += call_lines("set_peft_model_state_dict(", ["trainer.model", f"load_file({literal(path)})"], packed)
    if plan.quantization and (plan.precision == "float32" or (plan.precision == "float16" and not ds)):
        body += ["for parameter in trainer.model.parameters():  # TRL makes the adapter of a quantized base bfloat16"]
        body += ["    if parameter.requires_grad:", "        parameter.data = parameter.data.float()"]
    if not full and value_at(ds, "zero_optimization.stage") == 3:
        body.append(
            "trainer.model.enable_input_require_grads()  # DeepSpeed frees a leaf module without such an input"
        )
    body.append("trainer.train()")
    if full:
        body.append("trainer.model.config.use_cache = use_cache  # off for training only")
    body.append(f"trainer.save_model({literal(run_directory.MODEL if full else run_directory.ADAPTER)})")
    if parts := held_out_lines(plan.dataset):
        body.append("trainer.evaluate(test)" if parts == 2 else "trainer.evaluate()")
    body.append("trainer.save_state()  # losses and evaluations, in checkpoints/trainer_state.json")
    return [*head, *import_lines("\n".join(body)), "", *body]


def import_lines(body: str) -> list[str]:
    """What the body uses, in isort's order."""
    plain = [f"import {m}" for m in ("deepspeed", "torch") if re.search(rf"\b{m}\.", body)]
    lines = []
    for module, names in (
        ("bitsandbytes.nn", ["Linear4bit", "Linear8bitLt"]),
        ("datasets", ["load_dataset"]),
        ("peft", ["LoraConfig", "get_peft_config", "set_peft_model_state_dict"]),
        ("safetensors.torch", ["load_file"]),
        (
            "transformers",
            ["AddedToken", "AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "BitsAndBytesConfig", "set_seed"],
        ),
        ("trl", ["SFTConfig", "SFTTrainer"]),
    ):
        if used := [n for n in names if re.search(rf"\b{n}\b", body)]:
            lines.append(f"from {module} import {', '.join(used)}")
    standard = ["from glob import glob"] if "glob(" in body else []
    standard += ["from pathlib import Path"] if "Path(" in body else []
    return [*standard, *([""] if standard else []), *plain, *lines]


def training_argument_lines(plan: RunPlan) -> list[str]:
    """SFTConfig's arguments: what differs from its defaults, and what the kit's worker adds."""
    values = changed_fields("SFTConfig", {k: v for k, v in plan.trainer.items() if k != "model_init_kwargs"})
    values["logging_nan_inf_filter"] = False
    if value_at(plan.composed, "trainer.use_liger_kernel") == "auto":  # the same layers by other kernels
        values.pop("use_liger_kernel", None)
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        # The kit's own policy, and the same numbers without it; TRL's does not reach the base below an adapter.
        if value_at(values, (name, "selective")):
            values[name] = {k: v for k, v in values[name].items() if k != "selective"}
    more: dict[str, Any] = {"output_dir": run_directory.CHECKPOINTS}
    if trackers.tracker_names(plan.trainer.get("report_to")):
        more |= {k: v for k, v in {"run_name": plan.run_path.name, "project": plan.name}.items() if k not in values}
    if plan.deepspeed:
        more["deepspeed"] = JSON
    if plan.fsdp:
        more |= {"fsdp": True, "fsdp_config": plan.fsdp}
    if plan.trainer["use_cpu"] and plan.world_size > 1:
        more["ddp_backend"] = "gloo"
    return keyword_arguments({**more, **values})


def changed_fields(table: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values that are not the library's defaults."""
    defaults = fields.field_tables()[table]
    return {k: v for k, v in values.items() if k not in defaults or not equal_as_json(v, defaults[k].get("default"))}


def equal_as_json(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def tokenizer_lines(plan: RunPlan) -> list[str]:
    t, m = plan.tokenizer, plan.model
    given: dict[str, Any] = {"revision": t.revision or (m.revision if t.name_or_path is None else None)}
    given["trust_remote_code"] = m.trust_remote_code or None
    lines = call_lines(
        "tokenizer = AutoTokenizer.from_pretrained(",
        [literal(t.name_or_path or m.name_or_path), *assignment_lines(given)],
    )
    if t.added_tokens:
        lines += [f"tokens = {literal(t.added_tokens)}"]
        lines += ["tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in tokens], True)"]
    for key in ("pad_token", "eos_token", "bos_token"):
        if token := getattr(t, key):
            lines.append(f"tokenizer.{key} = {literal(token)}")
    if not t.pad_token:
        lines.append('assert tokenizer.pad_token, "name a token to pad with: TRL would take the end token"')
    if t.chat_template:
        lines.append(f'tokenizer.chat_template = Path("{TEMPLATE}").read_text(encoding="utf-8")')
    return [*lines, 'tokenizer.padding_side = "right"']


def model_lines(plan: RunPlan, packed: bool) -> list[str]:
    m, quantization = plan.model, plan.quantization
    common = {"revision": m.revision, "trust_remote_code": m.trust_remote_code or None}
    attention = None if m.attn_implementation in (ATTENTION, FLEX, "auto") else m.attn_implementation  # the kit's own
    kwargs = {**(plan.trainer.get("model_init_kwargs") or {}), "attn_implementation": attention}
    given = [f"dtype=torch.{m.dtype}", *assignment_lines(kwargs)]
    lines = []
    if m.random_init:
        lines += call_lines(
            "config = AutoConfig.from_pretrained(", [literal(m.name_or_path), *assignment_lines(common)], packed
        )
        only = {"trust_remote_code": m.trust_remote_code or None}
        lines += call_lines(
            "model = AutoModelForCausalLM.from_config(", ["config", *assignment_lines(only), *given], packed
        )
    else:
        if quantization:
            settings = {k: v for k, v in quantization.items() if k != "quant_method" and v is not None}
            lines += call_lines(
                "bits = BitsAndBytesConfig(", keyword_arguments(changed_fields("BitsAndBytesConfig", settings)), packed
            )
            given.append("quantization_config=bits")
        start = [literal(m.name_or_path), *assignment_lines(common), "use_safetensors=True", *given]
        lines += call_lines("model = AutoModelForCausalLM.from_pretrained(", start, packed)
    if quantization and quantization.get("load_in_4bit") and plan.trainer["use_cpu"]:
        lines += ["for module in model.modules():  # else an evaluation repacks the weights for a kernel of its own"]
        lines += ["    if isinstance(module, Linear4bit):", "        module.support_avx512bf16_for_cpu = False"]
    if quantization and quantization.get("load_in_8bit") and plan.deepspeed:
        lines += ["for module in model.modules():  # else DeepSpeed finds no scales when it loads a checkpoint"]
        lines += ["    if isinstance(module, Linear8bitLt):", "        module.init_8bit_state()"]
        lines += ["        module.weight.SCB = module.state.SCB"]
    if plan.peft is None:
        lines.append("use_cache = model.config.use_cache")
    if plan.tokenizer.added_tokens:
        lines += ["weight, needed = model.get_input_embeddings().weight, max(tokenizer.get_vocab().values()) + 1"]
        lines += ['if needed > getattr(weight, "ds_shape", weight.shape)[0]:']
        lines += ["    model.resize_token_embeddings(needed)"]
    return lines


def adapter_lines(plan: RunPlan) -> tuple[str, list[str]]:
    """The PEFT config, as the opening of a call and its arguments."""
    values = dict(plan.peft or {})
    kind = str(values.pop("peft_type", "LORA")).upper()
    values = changed_fields(kind, values)
    if kind == "LORA":
        return "adapter = LoraConfig(", keyword_arguments(values)
    return "adapter = get_peft_config(", [literal({"peft_type": kind, **values})]
