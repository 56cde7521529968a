"""`peft.init_from`: the adapter that a run starts from, compared with the run's own before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from kit.config.added_tokens import OUTPUT_EMBEDDINGS
from kit.errors import KitError, Problem
from kit.inspection.architectures import LINEARS
from kit.inspection.model import Base, identify_base
from kit.schema import fields
from kit.schema.run_plan import InitFrom, Model
from kit.storage import hub_cache, manifest, safetensors_header

KEY, FLAG = "peft.init_from", "peft.init_from_pickle"
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# What neither changes the adapter's function nor which tensors it has: training's own, bookkeeping, the first values.
NOT_COMPARED = set(
    """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout
    init_lora_weights runtime_config eva_config loftq_config corda_config lora_ga_config megatron_core
    megatron_config modules_to_tie target_modules_to_tie qalora_group_size""".split()
)
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others alter the base's weights


class InitialAdapter(NamedTuple):
    """`peft.init_from` and `peft.init_from_pickle` as given."""

    name: str  # a folder or a Hub id
    pickle: bool


def take_init_from(peft: Any) -> tuple[Any, InitialAdapter | None, list[Problem]]:
    """Split the section peft into what PEFT knows and the kit's own keys."""
    if not isinstance(peft, dict) or not {"init_from", "init_from_pickle"} & peft.keys():
        return peft, None, []
    rest = {k: v for k, v in peft.items() if k not in ("init_from", "init_from_pickle")}
    name, pickle = peft.get("init_from"), peft.get("init_from_pickle", False)
    problems = []
    if not isinstance(name, str | None) or name == "":
        problems.append(
            Problem(f"{KEY} must be a folder or a Hub id, not {name!r}", KEY, f"{KEY}=RUN/adapter", "init-from")
        )
    if not isinstance(pickle, bool):
        problems.append(Problem(f"{FLAG} must be true or false, not {pickle!r}", FLAG, f"{FLAG}=true", "init-from"))
    if name and "peft_type" not in rest:
        problems.append(
            Problem(f"peft=none, but {KEY} is given", KEY, "peft=lora, or merge the adapter first", "init-from")
        )
    return rest, InitialAdapter(name, bool(pickle)) if name and not problems else None, problems


def find_initial_adapter(
    start: InitialAdapter, peft: dict[str, Any], model: Model, base: Base, here: bool
) -> tuple[InitFrom | None, list[Problem], list[str]]:
    """Find the adapter to start from; return it with problems, and with notes of what cannot be known here.

    `here`: the run is about to start on this machine, so a Hub id must be in the cache.
    """
    try:
        folder = safetensors_header.find_model(start.name)
    except (OSError, ValueError) as error:
        return None, [Problem(f"{KEY} is no path that can be looked at: {error}", KEY, "check it", "init-from")], []
    if folder is None:
        on_hub = hub_cache.looks_like_id(start.name) and "/" in start.name
        if here or not on_hub:
            problem = f"{start.name} is neither an adapter folder nor in the Hub cache"
            fix = f"fetch it first: hf download {start.name}" if on_hub else "check the path"
            return None, [Problem(problem, KEY, fix, "init-from")], []
        note = f"{start.name} is not on this machine: it is compared when the run starts"
        return InitFrom(path=start.name), [], [note]
    if not (folder / CONFIG).is_file() and (folder / "adapter" / CONFIG).is_file():
        folder = folder / "adapter"  # a run directory stands for what it trained
    try:
        config, file, shapes = read_adapter_files(folder, start.pickle)
        check_hashes(folder, file)
    except KitError as error:
        return None, [Problem(p.problem, KEY, p.fix, "init-from-files") for p in error.problems], []
    problems, notes = compare_configs(folder, config, peft, base), []
    other_base, base_note = compare_base(folder, config, model, base)
    problems += other_base or compare_shapes(folder, shapes or {}, model)
    notes += [f"the adapter starts from {folder}: its weights, not its optimizer", *([base_note] if base_note else [])]
    if shapes is None:
        notes.append(f"{file.name} is a pickle: read weights-only, its tensors are compared when the run starts")
    sha256 = str(manifest.hash_file(file)["sha256"])
    return InitFrom(path=str(folder), weights=file.name, sha256=sha256), problems, notes


def read_adapter_files(folder: Path, pickle: bool) -> tuple[dict[str, Any], Path, dict[str, tuple[int, ...]] | None]:
    """adapter_config.json, the weights file, and its shapes by name (None of a pickle)."""
    if not (folder / CONFIG).is_file():
        raise KitError(f"{folder} is no adapter: it has no {CONFIG}", fix="give an adapter folder or a run directory")
    config = safetensors_header.read_json(folder / CONFIG)
    if (folder / WEIGHTS).is_file():
        shapes = {t.name: t.shape for t in safetensors_header.read_header(folder / WEIGHTS)}
        if not shapes:
            raise KitError(f"{folder / WEIGHTS} holds no tensors", fix="give another adapter")
        return config, folder / WEIGHTS, shapes
    if not (folder / PICKLE).is_file():
        raise KitError(f"{folder} has no {WEIGHTS}", fix="the adapter was not saved whole")
    if not pickle:
        raise KitError(
            f"{folder / PICKLE} is a pickle, and a pickle can hold code",
            fix=f"{FLAG}=true reads it weights-only (tensors, and nothing that runs), if you know where it comes from",
        )
    return config, folder / PICKLE, None


def check_hashes(folder: Path, file: Path) -> None:
    """KitError where a file differs from the hash in the adapter's manifest; without one nothing can be said."""
    if not (folder / manifest.NAME).is_file():
        return
    listed = manifest.read_manifest(folder)["files"]
    for path in (folder / CONFIG, file):
        if path.name in listed and manifest.hash_file(path)["sha256"] != listed[path.name]["sha256"]:
            raise KitError(f"{path} is not the file that was saved: its SHA-256 differs", fix="copy the adapter again")


def compare_configs(folder: Path, config: dict[str, Any], peft: dict[str, Any], base: Base) -> list[Problem]:
    """One problem that lists all settings that differ, with the overrides that make the run's equal."""
    theirs, ours = (str(c.get("peft_type", "LORA")).upper() for c in (config, peft))
    table = fields.tables().get(ours, {})
    if theirs != ours:
        return [
            Problem(
                f"{folder} is a {theirs} adapter, the run trains {ours}", KEY, f"peft.peft_type={theirs}", "init-from"
            )
        ]
    if "target_modules" not in table:
        return [Problem(f"{KEY} continues adapters of layers; {ours} has none", KEY, "leave it out", "init-from")]
    problems = []
    for where, settings in ((f"{folder / CONFIG}", config), ("the run", peft)):
        if (init := settings.get("init_lora_weights", True)) not in PLAIN_INITS:
            problem = f"init_lora_weights={init} in {where} alters the base's weights when it begins"
            fix = "peft.init_lora_weights=true, with an adapter that was begun so"
            problems.append(Problem(problem, KEY, fix, "init-from"))
    differ, mend = [], []
    for key, entry in table.items():
        if key in NOT_COMPARED or key == "peft_type" or "instead" in entry:
            continue
        default = entry.get("default")
        there, here = config.get(key, default), peft.get(key, default)
        if key in ("target_modules", "modules_to_save"):
            same = same_modules(key, config, peft, base)
        else:
            same = (there or None) == (here or None)
        if not same:
            differ.append(f"{key} is {format_value(there)} there, {format_value(here)} here")
            mend.append(f"peft.{key}={format_value(there)}")
    if differ:
        problems.append(
            Problem(
                f"the run's adapter is not the one in {folder}: {'; '.join(differ)}", KEY, " ".join(mend), "init-from"
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


def compare_shapes(folder: Path, shapes: dict[str, tuple[int, ...]], model: Model) -> list[Problem]:
    """The first LoRA matrix that fits no side of the base's weight, where the base's files are here."""
    place = safetensors_header.find_model(model.name_or_path, model.revision)
    try:
        stored = safetensors_header.read_tensors(place) if place else {}
    except KitError:
        return []  # the base itself is refused elsewhere
    for name, shape in shapes.items():
        module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        weight = stored.get(f"{module}.weight")
        if weight is None or len(weight.shape) != 2 or part not in ("A.weight", "B.weight"):
            continue
        side = shape[1] if part == "A.weight" else shape[0]
        if side not in weight.shape:
            rows, columns = weight.shape
            text = f"{folder} is an adapter of another base: {module} is {rows} x {columns} here, and it has {side}"
            return [Problem(text, KEY, "the base that it was trained on, or another adapter", "init-from-base")]
    return []


def compare_base(folder: Path, config: dict[str, Any], model: Model, base: Base) -> tuple[list[Problem], str]:
    """Whether the adapter was trained on the run's base: by the fingerprints where both are known, else a remark."""
    recorded = (manifest.read_manifest(folder).get("base") or {}) if (folder / manifest.NAME).is_file() else {}
    ours = identify_base(model, base.folder) if recorded else None
    if recorded and ours:
        if recorded.get("fingerprint") == ours["fingerprint"]:
            return [], ""
        problem = f"{folder} was trained on other weights than {model.name_or_path}"
        named = recorded.get("name_or_path")
        fix = f"model.name_or_path={named}" if named else "give its own base"
        return [Problem(problem, KEY, fix, "init-from-base")], ""
    named = recorded.get("name_or_path") or config.get("base_model_name_or_path")
    return [], f"that adapter was trained on {named or 'a base that it does not name'}: not compared with this base"
