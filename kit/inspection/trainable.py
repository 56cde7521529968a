"""What a run trains, counted without torch: the parameters of a base, and those that LoRA adds or opens.

parameters.json holds the modules of the known architectures with their shapes, as sums of products of keys of
config.json (tests/config/make_parameters.py finds them in transformers). tests/config/test_trainable.py compares with
PEFT, which also makes targets of a mixture of experts its own way: `all-linear` trains fused experts and routers.
"""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.inspection.architectures import EMBEDDING_NAMES, INPUT_EMBEDDINGS, MOST_LAYERS, OUTPUT_EMBEDDINGS

TABLE = Path(__file__).with_name("parameters.json")
DERIVED = {"head_dim": ("hidden_size", "num_attention_heads"), "num_key_value_heads": ("num_attention_heads",)}
ROUTERS = ("gate", "router")
# Settings of LoRA that add no parameter, or that are counted; with any other one nothing is said.
COUNTED = set(
    """task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules
    exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights
    layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core trainable_token_indices use_dora
    runtime_config lora_bias target_parameters ensure_weight_tying qalora_group_size loftq_config""".split()
)


@dataclass(frozen=True)
class Module:
    """A module of a base: `kind` is linear, conv1d, embedding or other; the shapes of its own parameters by name."""

    kind: str
    shapes: dict[str, tuple[int, ...]]


@dataclass
class Trained:
    """Numbers that train, of all that the base has; names of the modules that they belong to."""

    numbers: int = 0
    total: int = 0
    names: set[str] = field(default_factory=set)
    has_experts: bool = False
    experts: bool = False
    router: bool = False
    layers: int = 0


@functools.cache
def parameter_table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def list_modules(config: dict[str, Any]) -> dict[str, Module] | None:
    """Every module with parameters of its own, as transformers names it; None for a base that is not in the table."""
    entry = parameter_table()["types"].get(str(config.get("model_type")))
    if entry is None:
        return None
    values = with_defaults(config)
    layers = values.get(entry["count"])
    if any(config.get(key, value) != value for key, value in entry["fixed"].items()):
        return None
    if config.get("word_embed_proj_dim") not in (None, config.get("hidden_size")):  # OPT 350M projects
        return None
    if not isinstance(layers, int) or isinstance(layers, bool) or not 0 < layers <= MOST_LAYERS:
        return None
    try:
        kinds = {kind: _evaluate_modules(modules, values) for kind, modules in entry["kinds"].items()}
        modules = _evaluate_modules(entry["outside"], values)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):  # a key that this config.json does not have
        return None
    for number in range(layers):
        kind = "all" if "all" in kinds else _layer_kind(entry["split"], values, number)
        modules |= {f"{entry['layers']}.{number}.{name}": module for name, module in kinds[kind].items()}
    return modules


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config of the table under its class's own names, with the class's defaults where it says nothing."""
    entry = parameter_table()["types"][config["model_type"]]
    return {**entry["defaults"], **{entry["aliases"].get(k, k): v for k, v in config.items()}}


def _layer_kind(split: str, values: dict[str, Any], number: int) -> str:
    if split == "first_k_dense_replace":
        return "dense" if number < int(values.get(split) or 0) else "moe"
    step = values.get("decoder_sparse_step") or 1
    return "dense" if number in (values.get(split) or []) or (number + 1) % step else "moe"


def _evaluate_modules(modules: dict[str, Any], values: dict[str, Any]) -> dict[str, Module]:
    known: dict[str, Module] = {}
    for name, (kind, parameters) in modules.items():
        shapes = {}
        for key, sizes in parameters.items():
            parameter, _, flag = key.partition("?")
            if not flag or values.get(flag):
                shapes[parameter] = tuple(_evaluate_size(size, values) for size in sizes)
        known[name] = Module(kind, shapes)
    return known


def _evaluate_size(text: str, values: dict[str, Any]) -> int:
    return sum(math.prod(_evaluate_key(key, values) for key in term.split("*")) for term in text.split("+"))


def _evaluate_key(key: str, values: dict[str, Any]) -> int:
    if key.isdigit():
        return int(key)
    names = tuple(key.split("/")) if "/" in key else DERIVED.get(key, ())
    if values.get(key) is not None:
        return int(values[key])
    if key == "n_inner":
        return 4 * int(values["n_embd"])
    if not names:
        raise KeyError(key)
    first, *rest = (int(values[name]) for name in names)
    return first // rest[0] if rest else first


def count_trained(config: dict[str, Any], peft: dict[str, Any] | None) -> Trained | None:
    """Count what trains under full fine-tuning (peft None) or LoRA; None where the base or the method is not known."""
    modules = list_modules(config)
    if modules is None:
        return None
    tied = config.get("tie_word_embeddings", parameter_table()["types"][config["model_type"]]["tied"])
    sizes = {name: {k: math.prod(s) for k, s in m.shapes.items()} for name, m in modules.items()}
    if tied:  # one matrix for both ends
        for name in [n for n in sizes if n.rpartition(".")[2] in OUTPUT_EMBEDDINGS]:
            sizes[name].pop("weight", None)
    trained = Trained(total=sum(sum(s.values()) for s in sizes.values()))
    trained.has_experts = any(_is_expert(name) for name in modules)
    opened: set[tuple[str, str]] = set()  # parameters of the base that train, or whose copies do
    if peft is None:
        opened = {(name, key) for name, own in sizes.items() for key in own}
        trained.numbers = trained.total
    elif not _count_adapter(trained, opened, modules, str(config["model_type"]), peft, bool(tied)):
        return None
    trained.router = trained.router or any(name.rpartition(".")[2] in ROUTERS for name, _ in opened)
    trained.experts = trained.experts or any(_is_expert(name) for name, _ in opened)
    trained.names |= {name.rpartition(".")[2] for name, _ in opened}
    return trained


def _is_expert(name: str) -> bool:
    return name.endswith(".experts") or ".experts." in name


def _count_adapter(
    trained: Trained,
    opened: set[tuple[str, str]],
    modules: dict[str, Module],
    model_type: str,
    peft: dict[str, Any],
    tied: bool,
) -> bool:
    """Add what a LoRA config trains; whether all of it is known."""
    unknown = [key for key, value in peft.items() if value and key not in COUNTED]
    if str(peft.get("peft_type") or "LORA").upper() != "LORA" or unknown:
        return False
    converted = parameter_table()["types"][model_type]["converted"]
    rewritten = convert_moe_targets(modules, peft, converted) if converted else peft
    if rewritten is None:
        return False
    peft = rewritten
    targets = find_targets(list(modules), {n: m.kind for n, m in modules.items()}, peft)
    rows = peft.get("trainable_token_indices")
    if targets is None or (rows and tied):
        return False
    for name in targets:
        module = modules[name]
        if module.kind == "other":
            return False  # PEFT has no layer for it
        out, inside = module.shapes["weight"] if module.kind != "conv1d" else module.shapes["weight"][::-1]
        trained.numbers += _rank(name, peft) * (out + inside)
        trained.numbers += (inside if module.kind == "embedding" else out) * bool(peft.get("use_dora"))
        trained.numbers += out * bool(peft.get("lora_bias"))
    for name, parameter in _target_parameters(modules, peft):
        shape = modules[name].shapes[parameter]
        if len(shape) not in (2, 3):
            return False
        trained.numbers += (shape[0] if len(shape) == 3 else 1) * _rank(f"{name}.{parameter}", peft) * sum(shape[-2:])
        trained.names.add(parameter if parameter != "weight" else name.rpartition(".")[2])
        trained.experts = trained.experts or _is_expert(name)
        trained.router = trained.router or name.rpartition(".")[2] in ROUTERS
    trained.names |= {name.rpartition(".")[2] for name in targets}
    trained.router = trained.router or any(name.rpartition(".")[2] in ROUTERS for name in targets)
    numbered = {int(n[1]) for name in targets if (n := re.search(r"\.(\d+)\.", name))}
    trained.layers = len(numbered)
    saved = peft.get("modules_to_save") or []
    for name, module in modules.items():
        whole = any(_is_inside(name, str(s)) for s in saved)
        for parameter, shape in module.shapes.items():
            bias = "bias" in parameter and peft.get("bias", "none")
            if whole or bias == "all" or (bias == "lora_only" and name in targets):
                opened.add((name, parameter))
                trained.numbers += math.prod(shape)
    if tied and peft.get("ensure_weight_tying") and saved:
        return False
    for name, indices in rows.items() if isinstance(rows, dict) else [("", rows)] if rows else []:
        found = [n for n in modules if (n.endswith(name) if name else n.rpartition(".")[2] in INPUT_EMBEDDINGS)]
        trained.numbers += sum(len(indices) * modules[n].shapes["weight"][1] for n in found)
        trained.names |= {n.rpartition(".")[2] for n in found}
    return True


def convert_moe_targets(modules: dict[str, Module], peft: dict[str, Any], converted: str) -> dict[str, Any] | None:
    """Rewrite targets for fused experts as PEFT does (utils/transformers_weight_conversion.py); None where not known.

    PEFT takes the names of transformers 4, so that `all-linear` and `gate_proj` mean the experts' own parameters.
    """
    table, wanted = parameter_table()["moe"][converted], peft.get("target_modules")
    if isinstance(wanted, str):
        if wanted.lower() != "all-linear":
            return None
        found = (
            find_targets(list(modules), {n: m.kind for n, m in modules.items()}, {"target_modules": wanted}) or set()
        )
        wanted = [*dict.fromkeys([*(name.rpartition(".")[2] for name in sorted(found)), *table["targets"]])]
    old = {t: next((o for o in table["targets"] if t == o or t.endswith(f".{o}")), None) for t in wanted or []}
    named = {o for o in old.values() if o}
    ranks = dict(peft.get("rank_pattern") or {})
    for parameter, parts in table["fused"].items():
        if 0 < len(named.intersection(parts)) < len(parts):
            return None  # PEFT refuses one half of a fused parameter
        if named.issuperset(parts):
            ranks[rf".*\.{re.escape(parameter)}"] = int(peft.get("r") or 8) * len(parts)
    parameters = {*(peft.get("target_parameters") or []), *(table["targets"][o] for o in named)}
    rest = [t for t, o in old.items() if o is None]
    return {**peft, "target_modules": rest, "target_parameters": sorted(parameters), "rank_pattern": ranks}


def _is_inside(name: str, saved: str) -> bool:
    """Whether modules_to_save copies a module: PEFT compares the ends of names, and copies all that lies below."""
    parts = name.split(".")
    return any(".".join(parts[:end]).endswith(saved) for end in range(1, len(parts) + 1))


def _rank(name: str, peft: dict[str, Any]) -> int:
    pattern = peft.get("rank_pattern") or {}
    return int(next((r for key, r in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), peft.get("r") or 8))


def _target_parameters(modules: dict[str, Module], peft: dict[str, Any]) -> list[tuple[str, str]]:
    wanted = peft.get("target_parameters") or []
    full = [(name, parameter) for name, module in modules.items() for parameter in module.shapes]
    return [(n, p) for n, p in full if any(f"{n}.{p}" == w or f"{n}.{p}".endswith(f".{w}") for w in wanted)]


def find_targets(names: list[str], kinds: dict[str, str], peft: dict[str, Any]) -> set[str] | None:
    """List the modules that LoRA wraps (peft tuners_utils); None where PEFT chooses by itself."""
    wanted, excluded = peft.get("target_modules"), peft.get("exclude_modules")
    if not wanted:
        return set() if peft.get("target_parameters") else None
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        found = {n for n in names if kinds[n] in ("linear", "conv1d") and n.rpartition(".")[2] not in EMBEDDING_NAMES}
    else:
        found = {n for n in names if _matches(n, wanted)}
        layers, pattern = peft.get("layers_to_transform"), peft.get("layers_pattern")
        if layers not in (None, []) and not isinstance(wanted, str):
            found = {n for n in found if n in wanted or is_in_layers(n, layers, pattern)}
    return {n for n in found if not (excluded and _matches(n, excluded))}


def _matches(name: str, wanted: str | list[str]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == w or name.endswith(f".{w}") for w in wanted)


def is_in_layers(module: str, layers: int | list[int], patterns: str | list[str] | None) -> bool:
    """Whether PEFT counts a module among the chosen layers (peft tuners_utils.check_target_module_exists)."""
    named = [patterns] if isinstance(patterns, str) else patterns or []
    forms = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in named] or [r".*?\.[^.]*\.(\d+)\."]
    number = next((n for form in forms if (n := re.match(form, module))), None)
    return number is not None and int(number[1]) in (layers if isinstance(layers, list) else [layers])


def describe_trained(trained: Trained) -> str:
    """Say what trains: "13.1 M of 30.5 B (0.04 %) in q_proj, v_proj of 48 layers; router: no; experts: no"."""
    share = 100 * trained.numbers / max(trained.total + trained.numbers, 1)  # with the adapter, as PEFT counts
    text = f"{abbreviate(trained.numbers)} of {abbreviate(trained.total)} parameters ({share:.2g} %)"
    if trained.numbers == trained.total:
        text = f"all {abbreviate(trained.total)} parameters"
    elif trained.names:
        text += f" in {', '.join(sorted(trained.names))}"
        text += f" of {trained.layers} layer{'s' * (trained.layers != 1)}" if trained.layers else ""
    if trained.has_experts:
        text += f"; router: {'yes' if trained.router else 'no'}; experts: {'yes' if trained.experts else 'no'}"
    return text


def abbreviate(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
