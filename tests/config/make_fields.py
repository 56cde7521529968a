"""Write kit/schema/fields.json from the installed libraries: `python tests/config/make_fields.py`.

The kit checks settings without importing torch, so it carries this table instead of the classes.
`tests/config/test_fields.py` builds the table again and compares: a library upgrade shows up as a diff.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import importlib
import inspect
import json
import pathlib
import re
import types
import typing
from importlib.metadata import version
from typing import Any

from accelerate.utils import DynamoBackend
from torch._inductor import list_mode_options

from kit.schema import fields

TARGET = pathlib.Path(__file__).parents[2] / "kit" / "schema" / "fields.json"
ANY = ["bool", "int", "float", "str", "list", "dict", "none"]
PLAIN = {bool: "bool", int: "int", float: "float", str: "str", dict: "dict", list: "list", tuple: "list", set: "list"}
Field = dict[str, Any]
Table = dict[str, Field]


def plain(value: Any) -> Any:
    """A default as JSON holds it."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return {k: plain(v) for k, v in value.model_dump().items()}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if isinstance(value, bool) or value is None:
        return value
    for kind in (int, float, str):  # also unwraps int subclasses that print differently
        if isinstance(value, kind):
            return kind(value)
    return str(value).removeprefix("torch.")


def kinds(hint: Any, tables: dict[str, Table], prefix: str) -> Field:
    """The accepted JSON kinds of one annotation, its choices, list items and nested table."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in (None, type(None)):
        return {"kinds": ["none"]}
    if hint in (Any, object, inspect.Parameter.empty):
        return {"kinds": ANY}
    if origin in (typing.Union, types.UnionType):
        out: Field = {"kinds": []}
        for arg in args:
            got = kinds(arg, tables, prefix)
            out["kinds"] += [k for k in got.pop("kinds") if k not in out["kinds"]]
            for key, value in got.items():
                out[key] = [*out.get(key, []), *value] if isinstance(value, list) else value
        return out
    if origin is typing.Literal:
        return choices(list(args))
    if origin in PLAIN or hint in PLAIN:
        out = {"kinds": [PLAIN[origin or hint]]}
        if PLAIN[origin or hint] == "list" and args and args[0] is not Ellipsis:
            items = kinds(args[0], tables, prefix)
            out |= {"items": items} if items["kinds"] != ANY else {}
        return out
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return choices([plain(member) for member in hint])
    if isinstance(hint, type) and issubclass(hint, pathlib.Path) or "dtype" in str(hint):
        return {"kinds": ["str"]}
    if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or hasattr(hint, "model_fields")):
        name = f"{prefix}.{hint.__name__}"
        if name not in tables:
            tables[name] = {}
            build = dataclass_table if dataclasses.is_dataclass(hint) else pydantic_table
            tables[name] = build(hint, tables, prefix)
        return {"kinds": ["dict"], "table": name, "class": f"{hint.__module__}.{hint.__qualname__}"}
    raise TypeError(f"no JSON kind for the annotation {hint!r}: teach make_fields.py about it")


def choices(values: list[Any]) -> Field:
    """Choices of an Enum or Literal; a spelling such as name_[number] becomes a pattern."""
    out: Field = {"kinds": sorted({PLAIN[type(v)] for v in values})}
    words = [v for v in values if not isinstance(v, bool)]
    if fixed := list(dict.fromkeys(v for v in words if "[" not in str(v))):
        out["choices"] = fixed
    if patterns := [re.sub(r"\[.*?\]", r"\\d+", v) for v in words if "[" in str(v)]:
        out["patterns"] = patterns
    return out


def dataclass_table(cls: type, tables: dict[str, Table], prefix: str) -> Table:
    hints = typing.get_type_hints(cls)
    table: Table = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        if field.default_factory is not dataclasses.MISSING:
            default: Field = {"default": plain(field.default_factory())}
        elif field.default is not dataclasses.MISSING:
            default = {"default": plain(field.default)}
        else:
            default = {"required": True}
        entry = kinds(hints[field.name], tables, prefix) | default
        if words := field.metadata.get("choices"):
            entry["choices"] = list(words)
        table[field.name] = entry
    return table


def pydantic_table(cls: type, tables: dict[str, Table], prefix: str) -> Table:
    """One of DeepSpeed's models. A field with an alias is listed under it; the bare name points there."""
    table: Table = {}
    for name, field in cls.model_fields.items():
        entry = kinds(field.annotation, tables, prefix)
        default = field.get_default(call_default_factory=True)
        entry |= {"required": True} if field.is_required() else {"default": plain(default)}
        for bound in field.metadata:
            entry |= {b: plain(getattr(bound, b)) for b in ("gt", "ge", "lt", "le") if hasattr(bound, b)}
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("deprecated"):
            entry["instead"] = DEPRECATED[name]
        table[field.alias or name] = entry
        if field.alias:
            table[name] = {**entry, "alias": field.alias}  # DeepSpeed takes either spelling
    return table


# --- what an annotation does not say -------------------------------------------------------------------------------

TRAINER_EXTRA: Table = {
    # JSON text and paths are for a command line; a mapping says the same here, and its keys can be checked.
    **{
        name: {"kinds": ["dict", "none"]}
        for name in (
            "lr_scheduler_kwargs",
            "activation_checkpointing_kwargs",
            "gradient_checkpointing_kwargs",
            "model_init_kwargs",
            "dataset_kwargs",
        )
    },
    "accelerator_config": {"kinds": ["dict", "none"], "table": "SFTConfig.AcceleratorConfig"},
    "debug": {"choices": ["", "underflow_overflow"]},  # the other one is read on TPUs alone
    "include_num_input_tokens_seen": {"choices": ["all", "non_padding", "no"]},
    "pad_to_multiple_of": {"choices": ["auto"], "ge": 1},
    "fsdp": {"kinds": ["bool", "str", "list", "none"]},
    "parallelism_config": {"kinds": ["dict", "none"]},
    "per_device_train_batch_size": {"ge": 1, "le": 2**31 - 1},
    "per_device_eval_batch_size": {"ge": 1, "le": 2**31 - 1},
    "gradient_accumulation_steps": {"ge": 1, "le": 2**31 - 1},
    "eval_accumulation_steps": {"ge": 1, "le": 2**31 - 1},
    "eval_delay": {"ge": 0},
    "learning_rate": {"gt": 0},
    "warmup_steps": {"ge": 0},
    "max_grad_norm": {"ge": 0},
    "weight_decay": {"ge": 0},
    "adam_epsilon": {"gt": 0, "lt": 1},
    "adam_beta1": {"ge": 0, "lt": 1},
    "adam_beta2": {"ge": 0, "lt": 1},
    "label_smoothing_factor": {"ge": 0, "le": 1},
    "max_steps": {"le": 2**31 - 1},
    "torch_compile_backend": {"choices": [b.value.lower() for b in DynamoBackend if b.value != "NO"], "fold": True},
    "torch_compile_mode": {"choices": sorted(list_mode_options())},
    "max_length": {"ge": 2},  # the first token is never predicted
    "save_total_limit": {"ge": 1},  # 0 and less delete nothing, which is what null says
    "dataloader_num_workers": {"ge": 0, "le": 1024},
    "dataloader_prefetch_factor": {"ge": 1},
    "dataset_num_proc": {"ge": 1},
    "ddp_bucket_cap_mb": {"ge": 1},
    "ddp_timeout": {"ge": 1},
    "seed": {"ge": 0, "lt": 2**32},  # numpy's limit
    "data_seed": {"ge": 0, "lt": 2**63},
}
# PEFT's fields are typed, and their ranges stand in code: in a config's __post_init__, in a layer, or in torch.
# (expression for a whole name, what holds); the first that matches counts. tests/field_values.py looks for others.
WAVELETS = importlib.import_module("peft.tuners.waveft.constants").WAVELET_REDUCTIONS
ACTIVATIONS = importlib.import_module("transformers.activations").ACT2FN
SIZE, SHARE = {"ge": 1, "le": 2**16}, {"ge": 0, "le": 1}
PEFT_RANGES: list[tuple[str, Field]] = [
    (r".*dropout(_p)?", {"ge": 0, "lt": 1}),  # at 1 nothing is left to train
    (r"lora_alpha|alpha|\w+_alpha", {"gt": 0, "le": 2**31}),
    (r"sparse_rate", {"gt": 0, "le": 1}),
    (r"effective_rank|svd_threshold", {"gt": 0, "le": 2**20}),
    (r"sparsity", {"ge": 0, "lt": 1}),
    (r"beta[12]", {"gt": 0, "lt": 1}),
    (r"rho", {"ge": 1}),
    (r"tau", SHARE),
    (r".*seed|projection_prng_key", {"ge": 0, "lt": 2**63}),
    (r"depth", {"ge": 0, "le": 100}),
    (r"hybrid_r|num_frozen_tokens|boft_block_size|boft_block_num|oft_block_size", {"ge": 0, "le": 2**20}),
    (r"u|theta_d_length|n_frequency|num_samples|buffer_size|top_?k", {"ge": 1, "le": 2**31 - 1}),
    (r"group_size", {"ge": 2, "le": 2**20}),
    (r"num_B|asa_target_subspaces", {"ge": 2, "le": 2**10}),
    (r"num_virtual_tokens|shadow_\w+", {"ge": 1, "le": 2**14}),
    (r"num_cayley_neumann_terms", {"ge": 2, "le": 2**16}),  # with one nothing is trained
    (r"weight_tying", SHARE),
    (r"r|\w+_r|\w+_rank|num_\w+|\w+_size|\w+_len|stride_A|n_\w+|adapter_layers|\w+_dim", SIZE),
    (r"vector_length|boft_n_butterfly_factor|gralora_k", SIZE),
    (r"init_theta_d_bound|dirichlet_prior|router_temperature|softmax_temperature|init_\w+_bound|delora_lambda",
     {"gt": 0, "le": 1e6}),
    (r"orth_reg_weight|init_logits_std|eps|\w*scal\w*|\w+_weight|beta|gamma", {"ge": 0, "le": 1e6}),
    (r"tinit|tfinal|deltaT|total_step|\w+_interval|\w+_warmup", {"ge": 0, "le": 2**31 - 1}),
]  # fmt: skip
PEFT_OWN: dict[str, dict[str, Field]] = {  # where one method differs from the others
    "OFT": {"r": {"ge": 0, "le": 2**16}},
    "GLORA": {"r": SIZE},
    "PSOFT": {"ab_svd_init": {"choices": ["psoft_init", "pissa_init"]}, "psoft_svd": {"choices": ["full", "lowrank"]}},
    "DEFT": {"decomposition_method": {"choices": ["qr", "relu"]}},
    "ROAD": {"variant": {"choices": ["road_1", "road_2", "road_4"]}},
    "TINYLORA": {"init_weights": {"choices": ["uniform"]}},
    "SHADOW": {"init_weights": {"kinds": ["bool"]}},
    "PEANUT": {"act_fn": {"choices": sorted(ACTIVATIONS)}},
    "WAVEFT": {"wavelet_family": {"choices": sorted(WAVELETS)}},
}
# In causal language models one set of tokens stands before a row, and its numbers are the base's own.
PROMPT_METHODS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CARTRIDGE", "CPT")
DTYPES = ["float32", "bfloat16", "float16"]
QUANTIZATION: Table = {
    "load_in_8bit": {"kinds": ["bool"]},
    "load_in_4bit": {"kinds": ["bool"]},
    "llm_int8_threshold": {"kinds": ["float"]},
    "llm_int8_skip_modules": {"kinds": ["list", "none"], "items": {"kinds": ["str"]}},
    "llm_int8_enable_fp32_cpu_offload": {"kinds": ["bool"]},
    "llm_int8_has_fp16_weight": {"kinds": ["bool"]},
    "bnb_4bit_compute_dtype": {"kinds": ["str", "none"], "choices": DTYPES},
    "bnb_4bit_quant_type": {"kinds": ["str"], "choices": ["fp4", "nf4"]},
    "bnb_4bit_use_double_quant": {"kinds": ["bool"]},
    "bnb_4bit_quant_storage": {"kinds": ["str", "none"], "choices": [*DTYPES, "uint8", "int8", "float64"]},
}
DEPRECATED = {
    "cpu_offload": 'offload_optimizer: {"device": "cpu"}',
    "cpu_offload_param": 'offload_param: {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "offload_optimizer.pin_memory and offload_param.pin_memory",
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}
REMOVED = {  # top-level blocks that DeepSpeed 0.19 refuses -> what to write now
    "amp": "fp16 or bf16",
    "compression_training": "quantization in the model's own config",
    "curriculum_learning": "data_efficiency.data_sampling.curriculum_learning",
    "eigenvalue": "",
    "elasticity": "train_micro_batch_size_per_gpu and gradient_accumulation_steps",
    "graph_harvesting": "",
    "nebula": "checkpoint",
    "progressive_layer_drop": "",
    "quantize_training": "quantization in the model's own config",
    "sparse_attention": "",
    "sparse_gradients": "",
    "mics_shard_size": "zero_hpz_partition_size (ZeRO++)",
    "mics_hierarchical_params_gather": "zero_hpz_partition_size (ZeRO++)",
    "zeropp_loco_param": "",
}


def optimizer_types() -> Field:
    """DeepSpeed's own optimizers in any case; everything else is looked up in torch.optim as it is written."""
    import torch
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    base = torch.optim.Optimizer
    others = [n for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, base) and c is not base]
    names = [n for n in others if n.lower() not in DEEPSPEED_OPTIMIZERS]
    spelled = {n.lower(): n for n in "Adam AdamW Adagrad Lamb Lion Muon MuAdam MuAdamW MuSGD".split()}
    own = [spelled.get(n, n) for n in DEEPSPEED_OPTIMIZERS]
    return {"choices": [*own, *sorted(names)], "patterns": [f"(?i:{'|'.join(DEEPSPEED_OPTIMIZERS)})"]}


def adam_table(shared: Table) -> Table:
    """What any of the classes takes that the engine may choose for Adam and AdamW, and what the engine takes out."""
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    table: Table = dict(shared)
    for cls in (torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam):
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            if name not in ("self", "params", "model_params") and parameter.kind is not parameter.VAR_KEYWORD:
                table.setdefault(name, {"kinds": ANY, "default": plain(parameter.default)})
    own = {"torch_adam": False, "adam_w_mode": True}
    return table | {name: {"kinds": ["bool"], "default": value} for name, value in own.items()}


# Ranges and choices of what a scheduler takes, where the annotations do not say them.
SCHEDULER_EXTRA: Table = {
    "num_cycles": {"gt": 0},
    "power": {"ge": 0},
    "lr_end": {"ge": 0},
    "timescale": {"ge": 1},
    "min_lr": {"ge": 0},
    "max_lr": {"gt": 0},
    "min_lr_rate": {"ge": 0, "le": 1},
    "warmup_lr_rate": {"ge": 0, "le": 1},
    "min_lr_ratio": {"ge": 0, "le": 1},
    "num_decay_steps": {"ge": 0},
    "num_stable_steps": {"ge": 0},
    "warmup_type": {"choices": ["linear", "cosine", "1-sqrt"]},
    "decay_type": {"choices": ["linear", "cosine", "1-sqrt"]},
    "mode": {"choices": ["min", "max"]},
    "threshold_mode": {"choices": ["rel", "abs"]},
    "factor": {"gt": 0, "lt": 1},
    "patience": {"ge": 0},
    "threshold": {"ge": 0},
    "cooldown": {"ge": 0},
    "warmup": {"ge": 0},
    "eps": {"ge": 0},
    "window_size": {"ge": 1},
    "reset_start": {"ge": 0},
}


def scheduler_tables() -> dict[str, Table]:
    """What lr_scheduler_kwargs may hold, for each lr_scheduler_type: the parameters of transformers' function.

    get_scheduler gives the steps itself, and hands nothing on to the constant ones.
    """
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR

    own = {"self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    classes: dict[str, Any] = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": GreedyLR}  # behind **kwargs
    tables: dict[str, Table] = {}
    for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items():
        asked = classes[kind.value].__init__ if kind.value in classes else function
        taken = inspect.signature(asked).parameters
        if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            raise SystemExit(f"{function.__name__} takes **kwargs: say whose they are")
        hints = typing.get_type_hints(asked)
        table = tables[f"lr_scheduler_kwargs.{kind.value}"] = {}
        for name, parameter in taken.items():
            if name in own:
                continue
            empty = parameter.default is parameter.empty
            hint = hints.get(name, type(parameter.default))
            given: Field = {"required": True} if empty else {"default": plain(parameter.default)}
            entry = kinds(hint, {}, "")
            if entry["kinds"] == ["list", "float"] or entry["kinds"] == ["float", "list"]:
                entry = {"kinds": ["float"]}  # a list must have as many as the optimizer happens to have groups
            table[name] = entry | given | SCHEDULER_EXTRA.get(name, {})
    return tables


# What the function of transformers/trainer_optimizer.py that makes an optimizer imports: (module, what pip installs).
OPTIMIZER_PACKAGES: dict[str, list[str]] = {
    "_get_adafactor": [],
    "_get_adamw_torch": [],
    "_get_sgd": [],
    "_get_adagrad": [],
    "_get_rmsprop": [],
    "_get_adamw_torch_xla": ["torch_xla", "torch_xla"],
    "_get_adamw_torch_npu_fused": ["torch_npu", "torch_npu"],
    "_get_adamw_anyprecision": ["torchdistx", "git+https://github.com/pytorch/torchdistx"],
    "_get_bitsandbytes_optimizer": ["bitsandbytes", "bitsandbytes"],
    "_get_galore_optimizer": ["galore_torch", "galore-torch"],
    "_get_apollo_optimizer": ["apollo_torch", "apollo-torch"],
    "_get_lomo_optimizer": ["lomo_optim", "lomo-optim"],
    "_get_grokadamw": ["grokadamw", "grokadamw"],
    "_get_torchao_optimizer": ["torchao", "torchao"],
    "_get_schedule_free_optimizer": ["schedulefree", "schedulefree"],
    "_get_stable_adamw": ["optimi", "torch-optimi"],
}
CASTS = {"int": "int", "float": "float", "bool": "true", "strtobool": "bool", "getattr": "dtype"}  # bool("False")!
NO_OPTIONS = {"_get_bitsandbytes_optimizer": "ademamix"}  # the options that one branch reads are of those names alone


def optimizer_table() -> dict[str, Any]:
    """{trainer.optim: {package, pip, options: {name in optim_args: int | float | bool | dtype | str}}}.

    The options are what the function that makes it asks of `ctx.optim_args`, with the type that it casts to.
    """
    from transformers import trainer_optimizer

    table: dict[str, Any] = {}
    for name, function in trainer_optimizer._OPTIMIZER_HANDLERS.items():
        package = OPTIMIZER_PACKAGES[function.__name__]
        options = optimizer_options(function)
        if (only := NO_OPTIONS.get(function.__name__)) and only not in name.value:
            options = {}
        table[name.value] = dict(zip(("package", "pip"), package, strict=False)) | {"options": options}
    return dict(sorted(table.items()))


def optimizer_options(function: Any) -> dict[str, str]:
    """Which keys of `ctx.optim_args` a function reads, and what it casts each to."""
    options: dict[str, str] = {}
    tree = ast.parse(inspect.getsource(function))

    def asked(node: ast.AST) -> list[str]:
        """The keys that an expression asks for: optim_args.get("x"), .pop("x"), optim_args["x"]."""
        found = []
        for part in ast.walk(node):
            call = part.func if isinstance(part, ast.Call) else part
            held = call.value if isinstance(call, ast.Attribute | ast.Subscript) else None
            if isinstance(held, ast.Attribute) and held.attr == "optim_args":
                key = part.args[0] if isinstance(part, ast.Call) and part.args else getattr(part, "slice", None)
                if isinstance(key, ast.Constant):
                    found.append(str(key.value))
        return found

    for node in ast.walk(tree):
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):  # for key in ("momentum", ...): float(...)
            options |= {str(c.value): "float" for c in node.iter.elts if isinstance(c, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("ctx.optim_args.get", "ctx.optim_args.pop"):
            default = (
                ast.literal_eval(node.args[1]) if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else ""
            )
            if not isinstance(default, int | float) or default is None:  # a number would arrive as text
                options.setdefault(str(ast.literal_eval(node.args[0])), "str")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CASTS:
            options |= dict.fromkeys(asked(node), CASTS[node.func.id])
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):  # ....lower() in ("true", "1", "yes")
            options |= dict.fromkeys(asked(node.left), "bool")
    for node in ast.walk(tree):  # max_lr = optim_args.pop("max_lr"), cast below
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and asked(node.value):
            casts = [c for c in ast.walk(tree) if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)
                     and c.func.id in CASTS and c.args and isinstance(c.args[0], ast.Name)
                     and c.args[0].id == node.targets[0].id]  # fmt: skip
            if casts and isinstance(casts[0].func, ast.Name):
                options |= dict.fromkeys(asked(node.value), CASTS[casts[0].func.id])
    return options


def router_logits_types() -> list[str]:
    """Model types whose config has `output_router_logits`: TRL refuses router_aux_loss_coef for any other."""
    import transformers

    found = set()
    for file in pathlib.Path(transformers.__file__).parent.glob("models/*/configuration_*.py"):
        for part in re.split(r"\nclass ", file.read_text()):
            kind = re.search(r'model_type = "(\w+)"', part)
            if kind and re.search(r"^    output_router_logits\b", part, re.M):
                found.add(kind[1])
    return sorted(found)


def add_ranges(table: Table) -> None:
    """Give the numbers of one of PEFT's configs the ranges of PEFT_RANGES, and `bias` its words."""
    for key, entry in table.items():
        number = {"int", "float"} & set(entry["kinds"])
        held = next((bounds for name, bounds in PEFT_RANGES if number and re.fullmatch(name, key)), {})
        if number and entry.get("default") is not None and not isinstance(entry["default"], bool | list | dict):
            held = {b: v for b, v in held.items() if keeps(entry["default"], b, v)}
        entry |= {b: v for b, v in held.items() if b not in entry}
        if key.endswith("_pattern") and entry.get("default") == {}:
            entry["kinds"] = ["dict"]  # null is asked for its keys
        if key == "bias" and "choices" not in entry:
            entry |= {"choices": ["none", "all"], "patterns": [r"\w+_only"]}


def keeps(default: Any, bound: str, value: float) -> bool:
    """Whether a default is within a bound: where it is not, the range is another method's."""
    return isinstance(default, str) or fields.BOUNDS[bound][1](default, value)


def deepspeed_tables() -> dict[str, Table]:
    """The keys that DeepSpeed 0.19 reads from its JSON. Pydantic blocks come from their models, the rest
    (plain `dict.get` readers upstream) is listed here; test_zero.py searches the installed source for keys."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig
    from deepspeed.monitor import config as monitor
    from deepspeed.runtime import config as runtime
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
    from deepspeed.utils.logging import log_levels

    tables: dict[str, Table] = {}

    def f(kind: str, default: Any = None, **extra: Any) -> Field:
        return {"kinds": kind.split("|"), "default": default} | extra

    def block(name: str, model: type | None = None, /, **own: Field) -> Field:
        """Add the table of one block, from its model or from the fields given; returns the block's own entry."""
        tables[name] = pydantic_table(model, tables, "deepspeed") if model else own
        return {"kinds": ["dict"], "table": name}

    wide = ["fp32", "fp16", "bf16"]
    dtypes = f("str|none", choices=wide, fold=True)
    zero = block("deepspeed.zero_optimization", DeepSpeedZeroConfig)
    fp16, bf16 = block("deepspeed.fp16", DeepSpeedFP16Config), block("deepspeed.bf16", DeepSpeedBF16Config)
    checkpoint = block(
        "deepspeed.checkpoint",
        tag_validation=f("str", "WARN", choices=["WARN", "IGNORE", "FAIL"], fold=True),
        load_universal=f("bool", False),
        use_node_local_storage=f("bool", False),
        parallel_write=block("deepspeed.checkpoint.parallel_write", pipeline_stage=f("bool", False)),
        checkpoint_serialization=f("bool", True),
        writer=block(
            "deepspeed.checkpoint.writer",
            type=f("str|none", "FAST", choices=["MOCK", "PYTHON", "FAST"], fold=True),
            io_buffer_size=f("int", 64 * 1024**2, ge=1),
            io_buffer_double=f("bool", True),
            show_statistics=f("bool", False),
            data_parallel=f("str|none", choices=["REPLICA", "SOCKET", "MACHINE"], fold=True),
            decoupled=f("bool", False),
            io_multiplier=f("int", 1),
        ),
    )
    metric = f("str", "throughput", choices=["latency", "throughput", "flops", "forward", "step"])
    autotuning = block(
        "deepspeed.autotuning",
        enabled=f("bool", False),
        fast=f("bool", True),
        results_dir=f("str", "autotuning_results"),
        exps_dir=f("str", "autotuning_exps"),
        overwrite=f("bool", True),
        start_profile_step=f("int", 3),
        end_profile_step=f("int", 5),
        metric=metric,
        metric_path=f("str|none"),
        tuner_type=f("str", "gridsearch", choices=["gridsearch", "random", "model_based"]),
        tuner_early_stopping=f("int", 5),
        tuner_num_trials=f("int", 50),
        arg_mappings=f("dict|none"),
        model_info=f("dict|none"),
        model_info_path=f("str|none"),
        mp_size=f("int", 1),
        max_train_batch_size=f("int|none"),
        min_train_batch_size=f("int", 1),
        max_train_micro_batch_size_per_gpu=f("int", 1024),
        min_train_micro_batch_size_per_gpu=f("int", 1),
        num_tuning_micro_batch_sizes=f("int", 3),
    )
    sampling, routing = "deepspeed.data_efficiency.data_sampling", "deepspeed.data_efficiency.data_routing"
    orders = ["random", "seqlen", "dataloader"]
    curriculum = block(
        f"{sampling}.curriculum_learning",
        enabled=f("bool", False),
        data_cluster_path=f("str|none"),
        curriculum_metrics=f("dict", {}),  # {a metric of one's own: {its files, difficulty, schedule}}
    )
    batching = block(
        f"{sampling}.dynamic_batching",
        enabled=f("bool", False),
        metrics_path=f("str|none"),
        lr_scaling_method=f("str", "linear", choices=["linear", "sqrt", "none"]),
        min_batch_size=f("int", 1, ge=1),
        max_batch_size=f("int|none", ge=1),
        sequence_picking_order=f("str", "dataloader", choices=orders),
        max_tokens=f("int|none", ge=1),
        verbose=f("bool", False),
    )
    random_ltd = block(
        f"{routing}.random_ltd",
        enabled=f("bool", False),
        total_layer_num=f("int|none", ge=1),
        random_ltd_layer_num=f("int|none", ge=1),
        random_ltd_layer_id=f("list|none", items={"kinds": ["int"]}),
        model_mask_name=f("str|none"),
        model_type=f("str|none", choices=["encoder", "decoder"]),
        hidden_state_order=f("str|none"),
        micro_batch_size=f("int|none", ge=1),
        global_batch_size=f("int|none", ge=1),
        random_ltd_schedule=f("dict", {}),
        layer_token_lr_schedule=f("dict", {}),
    )
    data_efficiency = block(
        "deepspeed.data_efficiency",
        enabled=f("bool", False),
        seed=f("int", 1234),
        data_sampling=block(
            sampling,
            enabled=f("bool", False),
            num_epochs=f("int", 1000),
            num_workers=f("int", 0),
            pin_memory=f("bool", False),
            curriculum_learning=curriculum,
            dynamic_batching=batching,
        ),
        data_routing=block(routing, enabled=f("bool", False), random_ltd=random_ltd),
    )
    experts = dataclass_table(AutoEPConfig, tables, "deepspeed")
    tables["deepspeed.expert_parallel"] = {k: v for k, v in experts.items() if not k.startswith("_")}
    for key, entry in tables["deepspeed.expert_parallel"].items():
        if "object" in str(entry["default"]):  # a private marker for "not given"
            entry["default"] = None
        if key == "load_balance_coeff":
            entry["kinds"] = ["none"]  # this build supports no other
        if entry["default"] == "auto" and key in ("top_k", "routed_scaling_factor"):
            entry["kinds"] = ["str", "int", "float"]

    schedules: dict[str, list[str]] = {}
    for name in lr_schedules.VALID_LR_SCHEDULES:
        taken = inspect.signature(getattr(lr_schedules, name).__init__).parameters
        schedules[name] = [p for p in taken if p not in ("self", "optimizer")]
        tables[f"deepspeed.scheduler.{name}"] = {
            p: {"kinds": ANY, "default": None if taken[p].default is taken[p].empty else plain(taken[p].default)}
            for p in schedules[name]
        }
        for auto in ("warmup_min_lr", "warmup_max_lr", "total_num_steps", "warmup_num_steps"):
            if auto in schedules[name]:
                whole = auto.endswith("steps")
                entry = tables[f"deepspeed.scheduler.{name}"][auto]
                entry |= {"auto": True, "kinds": ["int"] if whole else ["float", "list", "none"]}
                entry |= {"ge": 1} if whole else {}

    batch = f("int|none", ge=1, auto=True)
    tables["deepspeed"] = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": batch,
        "managed_gradient_accumulation": f("bool", True),
        "gradient_clipping": f("float", runtime.GRADIENT_CLIPPING_DEFAULT, ge=0, auto=True),
        "steps_per_print": f("int|none", ge=1),
        "dump_state": f("bool", False),
        "disable_python_gc": f("bool", False),
        "disable_allgather": f("bool", False),
        "communication_data_type": dtypes,
        "seq_parallel_communication_data_type": dtypes | {"default": "fp32"},
        "prescale_gradients": f("bool", False),
        "gradient_predivide_factor": f("float", 1.0, gt=0),
        "gradient_allreduce_op": f("str", "mean", choices=["mean", "sum"], fold=True),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": f("bool", False),
        "zero_force_ds_cpu_optimizer": f("bool", True),
        "fp16": fp16,
        "bf16": bf16,
        "bfloat16": {"kinds": ["dict"], "instead": "bf16"},
        "torch_autocast": block(
            "deepspeed.torch_autocast",
            enabled=f("bool", False),
            dtype=f("str", "bfloat16", choices=["float16", "bfloat16", "float32", "fp16", "bf16", "fp32", "half"]),
            lower_precision_safe_modules=f("list|none", items={"kinds": ["str"]}),
        ),
        "optimizer": block(
            "deepspeed.optimizer",
            type=f("str", required=True, **optimizer_types()),
            params=block(
                "deepspeed.optimizer.params",
                lr=f("float", auto=True, ge=0),
                betas=f("list", auto=True, items={"kinds": ["float"]}),
                eps=f("float", auto=True, ge=0),
                weight_decay=f("float", auto=True),
                max_grad_norm={"kinds": ["float"], "instead": "gradient_clipping at the top level"},
            )
            | {"open": True},
            legacy_fusion=f("bool", False),
        ),
        "scheduler": block(
            "deepspeed.scheduler",
            type=f("str", required=True, choices=list(schedules)),
            params=f("dict", {}),
        ),
        "activation_checkpointing": block(
            "deepspeed.activation_checkpointing",
            partition_activations=f("bool", False),
            number_checkpoints=f("int|none"),
            contiguous_memory_optimization=f("bool", False),
            synchronize_checkpoint_boundary=f("bool", False),
            profile=f("bool", False),
            cpu_checkpointing=f("bool", False),
        ),
        "flops_profiler": block(
            "deepspeed.flops_profiler",
            enabled=f("bool", False),
            recompute_fwd_factor=f("float", 0.0),
            profile_step=f("int", 1),
            module_depth=f("int", -1),
            top_modules=f("int", 1),
            detailed=f("bool", True),
            output_file=f("str|none"),
        ),
        "comms_logger": block("deepspeed.comms_logger", CommsLoggerConfig),
        "tensorboard": block("deepspeed.tensorboard", monitor.TensorBoardConfig),
        "wandb": block("deepspeed.wandb", monitor.WandbConfig),
        "csv_monitor": block("deepspeed.csv_monitor", monitor.CSVConfig),
        "comet": block("deepspeed.comet", monitor.CometConfig),
        "wall_clock_breakdown": f("bool", False),
        "memory_breakdown": f("bool", False),
        "timers": block(
            "deepspeed.timers", throughput=block("deepspeed.timers.throughput", DeepSpeedThroughputTimerConfig)
        ),
        "log_level": f("str|none", choices=list(log_levels), fold=True),
        "checkpoint": checkpoint,
        "datastates_ckpt": f("bool|dict|none"),
        "data_types": block(
            "deepspeed.data_types",
            grad_accum_dtype=dtypes,
            param_dtype=dtypes,
            buffer_dtype=dtypes,
            keep_in_fp32_modules=f("str|list", "auto", choices=["auto"]),
        ),
        "aio": block(
            "deepspeed.aio",
            block_size=f("int", 1048576, ge=1),
            queue_depth=f("int", 8, ge=1),
            intra_op_parallelism=f("int", 1, ge=1),
            single_submit=f("bool", False),
            overlap_events=f("bool", True),
            use_gds=f("bool", False),
        )
        | {"kinds": ["dict", "none"]},
        "dataloader_drop_last": f("bool", False),
        "vocabulary_size": f("int|none"),
        "autotuning": autotuning,
        "data_efficiency": data_efficiency,
        "hybrid_engine": block("deepspeed.hybrid_engine", runtime.HybridEngineConfig),
        "pipeline": block(
            "deepspeed.pipeline",
            stages=f("int|str", "auto", choices=["auto"]),
            partition=f("str", "best"),
            seed_layers=f("bool", False),
            activation_checkpoint_interval=f("int", 0),
            pipe_partitioned=f("bool", True),
            grad_partitioned=f("bool", True),
        ),
        "weight_quantization": block("deepspeed.weight_quantization", WeightQuantConfig),
        "compile": block("deepspeed.compile", CompileConfig),
        "tensor_parallel": block("deepspeed.tensor_parallel", TPTrainingConfig),
        "expert_parallel": {"kinds": ["dict"], "table": "deepspeed.expert_parallel"},
        "use_data_before_expert_parallelism": f("bool", False),
        "sequence_parallel_size": f("int", 1, ge=1),
        "data_parallel_size": f("int|none", ge=1),
    }
    tables["deepspeed.optimizer.adam"] = adam_table(tables["deepspeed.optimizer.params"])  # others' params are free

    for key in runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS:
        tables["deepspeed"][key] = {"kinds": ANY, "instead": REMOVED[key], "removed": True}
    zero_table = tables["deepspeed.zero_optimization"]
    for key in runtime._REMOVED_ZERO_CONFIG_KEYS:
        zero_table[key] = {"kinds": ANY, "instead": REMOVED[key], "removed": True}

    for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
                "stage3_gather_16bit_weights_on_model_save"):  # fmt: skip
        zero_table[key]["auto"] = True
    for name, table in tables.items():
        if name.endswith(("OffloadParamConfig", "OffloadOptimizerConfig")):
            table["device"]["auto"] = table["nvme_path"]["auto"] = True
        if name.endswith("LeafModuleConfig"):
            for entry in table.values():
                entry["kinds"] = ["list", "str"]  # one name is taken as a list of one
        if name.endswith("ZenFlowConfig"):
            table["select_strategy"]["choices"] = ["auto", "step", "epoch"]
            table["select_interval"]["choices"] = table["update_interval"]["choices"] = ["auto"]
    for precision in ("deepspeed.fp16", "deepspeed.bf16"):
        tables[precision]["enabled"]["auto"] = True
    tables["deepspeed.fp16"]["loss_scale"]["ge"] = 0
    zero_table["stage"] = {"kinds": ["int"], "choices": [0, 1, 2, 3], "default": 0}
    return tables


def build() -> dict[str, Any]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from transformers import BitsAndBytesConfig
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_pt_utils import AcceleratorConfig
    from trl import SFTConfig

    tables: dict[str, Table] = {}
    trainer = dataclass_table(SFTConfig, tables, "SFTConfig")
    for key, extra in TRAINER_EXTRA.items():
        trainer[key] |= extra
    reporters = ["all", "none", *sorted(INTEGRATION_TO_CALLBACK)]
    trainer["report_to"] |= {"choices": reporters, "items": {"kinds": ["str"], "choices": reporters}}
    tables["SFTConfig"] = trainer
    tables["SFTConfig.AcceleratorConfig"] = dataclass_table(AcceleratorConfig, tables, "SFTConfig")

    for peft_type, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        table = dataclass_table(cls, tables, "peft")
        add_ranges(table)
        for key, extra in PEFT_OWN.get(peft_type.value, {}).items():
            table[key] |= extra
        table["task_type"] |= {"choices": ["CAUSAL_LM"]}  # the models of this kit
        if peft_type.value in PROMPT_METHODS:
            table["task_type"]["kinds"] = ["str"]
            for key in ("num_virtual_tokens", "num_ranks", "num_tasks"):
                if key in table and peft_type.value != "CPT":
                    table[key]["kinds"] = ["int"]
            if peft_type.value != "CPT":
                table["num_virtual_tokens"] = {"required": True} | table["num_virtual_tokens"]
                del table["num_virtual_tokens"]["default"]
            table["num_transformer_submodules"] |= {"le": 1}
        table["peft_type"] |= {"choices": [peft_type.value], "class": f"{cls.__module__}.{cls.__name__}"}
        tables[peft_type.value] = table

    for name, table in tables.items():
        if name.startswith("peft."):
            add_ranges(table)
    taken = inspect.signature(BitsAndBytesConfig.__init__).parameters.values()
    names = {p.name: p.default for p in taken if p.name != "self" and p.kind is not p.VAR_KEYWORD}
    if set(names) != set(QUANTIZATION):
        raise SystemExit(f"BitsAndBytesConfig changed: {set(names) ^ set(QUANTIZATION)}")
    tables["BitsAndBytesConfig"] = {k: QUANTIZATION[k] | {"default": plain(d)} for k, d in names.items()}

    tables |= scheduler_tables()
    tables |= deepspeed_tables()
    packages = ("trl", "transformers", "peft", "bitsandbytes", "deepspeed")
    return {
        "generated_from": {p: version(p) for p in packages},
        "optimizers": optimizer_table(),
        "router_logits": router_logits_types(),
        "tables": dict(sorted(tables.items())),
    }


def dump(data: dict[str, Any]) -> str:
    """JSON with one field to a line, so that an upgrade reads well as a diff."""
    blocks = []
    for name, table in data["tables"].items():
        rows = ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in table.items())
        blocks.append(f"  {json.dumps(name)}: {{\n{rows}\n  }}")
    optimizers = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in data["optimizers"].items())
    head = json.dumps(data["generated_from"])
    return (
        f'{{\n "generated_from": {head},\n "router_logits": {json.dumps(data["router_logits"])},\n'
        f' "optimizers": {{\n{optimizers}\n }},\n "tables": {{\n' + ",\n".join(blocks) + "\n }\n}\n"
    )


if __name__ == "__main__":
    text = dump(build())
    TARGET.write_text(text)
    print(f"{TARGET.name}: {len(json.loads(text)['tables'])} tables, {len(text)} bytes")
