"""`peft.init_from`: the adapter that a run starts from, compared with the run's own before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kit.config.init_from import INIT_FROM, INIT_FROM_PICKLE, InitialAdapter
from kit.errors import KitError, Problem
from kit.inspection.adapter import (
    CONFIG,
    PLAIN_INITS,
    PREFIX,
    SAVE_AGAIN,
    AdapterFolder,
    holds_adapter,
    is_embedding,
    module_or_parameter,
    read_adapter_folder,
    unknown_modules,
)
from kit.inspection.architectures import LINEARS, OUTPUT_EMBEDDINGS
from kit.inspection.model import Base, identify_base
from kit.schema import fields
from kit.schema.run_plan import InitFrom, Model
from kit.storage import hub_cache, manifest, safetensors_header

# What neither changes the adapter's function nor which tensors it has: training's own, bookkeeping, the first values.
NOT_COMPARED = set(
    """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout
    init_lora_weights runtime_config eva_config loftq_config corda_config lora_ga_config megatron_core
    megatron_config modules_to_tie target_modules_to_tie qalora_group_size""".split()
)


def find_initial_adapter(
    start: InitialAdapter, peft: dict[str, Any], model: Model, base: Base, here: bool
) -> tuple[InitFrom | None, list[Problem], list[str]]:
    """Find the adapter to start from; return it with problems, and with notes of what cannot be known here.

    `here`: the run is about to start on this machine, so a Hub id must be in the cache.
    """
    try:
        folder = safetensors_header.find_model_folder(start.name)
    except (OSError, ValueError) as error:
        return (
            None,
            [Problem(f"{INIT_FROM} is no path that can be looked at: {error}", INIT_FROM, "check it", "init-from")],
            [],
        )
    if folder is None:
        on_hub = hub_cache.is_hub_id(start.name) and "/" in start.name
        if here or not on_hub:
            problem = f"{start.name} is neither an adapter folder nor in the Hub cache"
            fix = f"fetch it first: hf download {start.name}" if on_hub else "check the path"
            return None, [Problem(problem, INIT_FROM, fix, "init-from")], []
        note = f"{start.name} is not on this machine: it is compared when the run starts"
        return InitFrom(path=start.name), [], [note]
    if not holds_adapter(folder) and holds_adapter(folder / "adapter"):
        folder = folder / "adapter"  # a run directory stands for what it trained
    try:
        adapter = read_adapter_folder(folder, accept_pickle=start.pickle)
    except KitError as error:
        return None, [Problem(p.problem, INIT_FROM, _with_flag(p), "init-from-files") for p in error.problems], []
    problems, notes = compare_configs(folder, adapter.config, peft, base), []
    base_problems, remark = compare_base(adapter, model, base)
    problems += base_problems or compare_shapes(adapter, model)
    notes += [f"the adapter starts from {folder}: its weights, not its optimizer", *([remark] if remark else [])]
    file = adapter.weights
    if adapter.tensors is None:
        notes.append(f"{file.name} is a pickle: read weights-only, its tensors are compared when the run starts")
    sha256 = str(manifest.hash_file(file)["sha256"])
    return InitFrom(path=str(folder), weights=file.name, sha256=sha256), problems, notes


def _with_flag(problem: Problem) -> str:
    """The fix of a refused adapter folder, with the key that allows a pickle where one was refused."""
    if problem.fix != SAVE_AGAIN:
        return problem.fix
    return f"{problem.fix}; or {INIT_FROM_PICKLE}=true reads it weights-only (tensors, and nothing that runs)"


def compare_configs(folder: Path, config: dict[str, Any], peft: dict[str, Any], base: Base) -> list[Problem]:
    """One problem that lists all settings that differ, with the overrides that make the run's equal."""
    source_type, run_type = (str(c.get("peft_type", "LORA")).upper() for c in (config, peft))
    table = fields.field_tables().get(run_type, {})
    if source_type != run_type:
        return [
            Problem(
                f"{folder} is a {source_type} adapter, the run trains {run_type}",
                INIT_FROM,
                f"peft.peft_type={source_type}",
                "init-from",
            )
        ]
    if "target_modules" not in table:
        return [
            Problem(
                f"{INIT_FROM} continues adapters of layers; {run_type} has none",
                INIT_FROM,
                "leave it out",
                "init-from",
            )
        ]
    problems = []
    for where, settings in ((f"{folder / CONFIG}", config), ("the run", peft)):
        if (init := settings.get("init_lora_weights", True)) not in PLAIN_INITS:
            problem = f"init_lora_weights={init} in {where} alters the base's weights when it begins"
            fix = "peft.init_lora_weights=true, with an adapter that was begun so"
            problems.append(Problem(problem, INIT_FROM, fix, "init-from"))
    differences, overrides = [], []
    for key, entry in table.items():
        if key in NOT_COMPARED or key == "peft_type" or "instead" in entry:
            continue
        default = entry.get("default")
        source_value, run_value = config.get(key, default), peft.get(key, default)
        if key in ("target_modules", "modules_to_save"):
            same = same_modules(key, config, peft, base)
        else:
            same = (source_value or None) == (run_value or None)
        if not same:
            differences.append(f"{key} is {format_value(source_value)} there, {format_value(run_value)} here")
            overrides.append(f"peft.{key}={format_value(source_value)}")
    if differences:
        problems.append(
            Problem(
                f"the run's adapter is not the one in {folder}: {'; '.join(differences)}",
                INIT_FROM,
                " ".join(overrides),
                "init-from",
            )
        )
    return problems


def same_modules(key: str, config: dict[str, Any], peft: dict[str, Any], base: Base) -> bool:
    """Whether two lists name the same modules by their leaves; true where only the built model could tell."""
    sides = []
    for settings in (config, peft):
        value = settings.get(key)
        if value == "all-linear":
            known = LINEARS.get((base.config or {}).get("model_type", ""))
            if known is None:
                return True
            value = known
        if isinstance(value, str):
            return True  # a regular expression: the ranks compare tensor by tensor
        leaves = {str(v).rpartition(".")[2] for v in value or ()}
        if key == "modules_to_save" and settings.get("ensure_weight_tying"):
            leaves -= set(OUTPUT_EMBEDDINGS)  # PEFT writes down the one end that holds the tied matrix
        sides.append(leaves)
    return sides[0] == sides[1]


def format_value(value: Any) -> str:
    """A value as one would type it behind `key=`."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(sorted(map(str, value)))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{format_value(v)}" for k, v in value.items()) + "}"
    return str(value)


def compare_shapes(adapter: AdapterFolder, model: Model) -> list[Problem]:
    """Refuse the first tensor that has no place in the base, or another shape, where the base's files are here."""
    base_folder = safetensors_header.find_model_folder(model.name_or_path, model.revision)
    try:
        stored = safetensors_header.read_tensors(base_folder) if base_folder else {}
    except KitError:
        return []  # the base itself is refused elsewhere
    if unknown := [
        name for key in adapter.tensors or {} if (name := _parameter_not_in_base(key, adapter.config, stored))
    ]:
        refusal = unknown_modules(adapter.folder, unknown).problems[0]
        return [Problem(refusal.problem, INIT_FROM, refusal.fix, "init-from-base")]
    for key, tensor in (adapter.tensors or {}).items():
        module, _, part = key.removeprefix(PREFIX).partition(".lora_")
        weight = stored.get(f"{module}.weight")
        if weight is None or len(weight.shape) != 2 or part not in ("A.weight", "B.weight"):
            continue
        side = tensor.shape[1] if part == "A.weight" else tensor.shape[0]
        if side not in weight.shape:
            rows, columns = weight.shape
            text = f"{adapter.folder} is an adapter of another base: {module} is {rows} x {columns} here, and it has"
            fix = "the base that it was trained on, or another adapter"
            return [Problem(f"{text} {side}", INIT_FROM, fix, "init-from-base")]
    return []


def _parameter_not_in_base(key: str, config: dict[str, Any], stored: dict[str, Any]) -> str:
    """The parameter that a key replaces where the base has none of that name; empty where it has, or may have.

    The base may hold modules that are saved whole, embeddings and biases under another name, or tied.
    """
    parameter = module_or_parameter(key)
    module, _, leaf = parameter.rpartition(".")
    saved = any(module.endswith(str(name)) for name in config.get("modules_to_save") or ())
    if not stored or not key.startswith(PREFIX) or leaf != "weight" or ".lora_" in key or saved or is_embedding(key):
        return ""
    return "" if parameter in stored else parameter


def compare_base(adapter: AdapterFolder, model: Model, base: Base) -> tuple[list[Problem], str]:
    """Whether the adapter was trained on the run's base: by the fingerprints where both are known, else a remark."""
    recorded = adapter.base
    own = identify_base(model, base.folder) if recorded else None
    if recorded and own:
        if recorded.get("fingerprint") == own["fingerprint"]:
            return [], ""
        problem = f"{adapter.folder} was trained on other weights than {model.name_or_path}"
        named = recorded.get("name_or_path")
        fix = f"model.name_or_path={named}" if named else "give its own base"
        return [Problem(problem, INIT_FROM, fix, "init-from-base")], ""
    named = recorded.get("name_or_path") or adapter.config.get("base_model_name_or_path")
    return [], f"that adapter was trained on {named or 'a base that it does not name'}: not compared with this base"
