"""From the composed tree to a RunPlan: every section checked, every "auto" resolved, all problems in one refusal."""

from __future__ import annotations

import copy
import difflib
import math
import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kit import hardware, paths
from kit.config import dataset as data_files
from kit.config import fields, rules, zero
from kit.config.compose import Composed
from kit.config.model import Base, identify, inspect
from kit.config.schema import Dataset, Launch, RunInput, RunPlan, Strict, identity_hash, leaves
from kit.errors import KitError, Problem

VERSION = "0.1.0"
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
PATHS = (  # (section, key) of what is looked for on the disk
    ("model", "name_or_path"), ("model", "revision"), ("tokenizer", "name_or_path"), ("tokenizer", "chat_template"),
    ("dataset", "path"), ("dataset", "eval_path"), ("launch", "script"), ("", "runs_dir"),
)  # fmt: skip
OWNED = {  # fields of SFTConfig that another part of the description holds
    "output_dir": "the run directory holds everything: runs_dir=FOLDER, name=NAME",
    "deepspeed": "deepspeed=zero2, or deepspeed=/path/my.json",
    "fsdp": "use the group fsdp",
    "fsdp_config": "use the group fsdp",
    "hub_token": "secrets come from the environment: export HF_TOKEN=...",
    "push_to_hub_token": "secrets come from the environment: export HF_TOKEN=...",
    "resume_from_checkpoint": "kit resume RUN",
    "model_init_kwargs.dtype": "model.dtype=...",
}


def build_plan(composed: Composed, *, here: bool = True, world_size: int | None = None) -> RunPlan:
    """The frozen plan of a composed run; KitError with every problem found.

    `here`: the run is about to start on this machine, so its hardware must do; else it is planned for elsewhere.
    `world_size`: processes already started (the worker door under a launcher); None: `launch.num_gpus` decides.
    """
    tree = composed.tree
    problems: list[Problem] = []
    set_by = origin(composed.provenance)

    given, found = read_input(tree, set_by)
    problems += found
    trainer, found = read_trainer(tree.get("trainer"), set_by)
    problems += found
    peft_type = tree_at(tree, ("peft", "peft_type")) or "LORA"
    peft, found = read_table(tree.get("peft"), str(peft_type), "peft", set_by)
    problems += found
    quantization, found = read_table(tree.get("quantization"), "BitsAndBytesConfig", "quantization", set_by)
    problems += found
    deepspeed, found = read_deepspeed(tree.get("deepspeed"), set_by)
    problems += found
    if given is None:
        raise KitError(problems)
    problems += unusable(given, set_by)
    problems += located(fields.check("SFTConfig", given.tracking, "tracking"), set_by)
    if any(p.rule in ("path", "count") for p in problems):
        raise KitError(problems)

    base, found = inspect(given.model, here)
    problems += located(found, set_by, "model.name_or_path")
    columns_format, found = look_at_data(given.dataset, here)
    problems += located(found, set_by)

    notes = list(base.notes)
    launch, on_cpu = resolve_launch(given.launch, trainer, bool(deepspeed), here, world_size, notes)
    trainer["use_cpu"] = on_cpu
    precision = resolve_precision(trainer, on_cpu, notes)
    world = world_size or launch.num_gpus
    assert isinstance(world, int)
    global_batch, found = resolve_batch(trainer, given.global_batch_size, world, set_by, composed.provenance)
    problems += found
    for key, value in given.tracking.items():
        trainer.setdefault(key, value)

    model = given.model.model_copy(
        update={"dtype": load_dtype(given.model.dtype, precision, bool(peft), bool(deepspeed))}
    )
    resolved: dict[str, Any] = {
        "model": model.model_dump(),
        "tokenizer": given.tokenizer.model_dump(),
        "dataset": given.dataset.model_dump(),
        "peft": peft,
        "quantization": quantization,
        "deepspeed": deepspeed,
        "fsdp": dict(given.fsdp) or None,
        "trainer": trainer,
        "launch": launch.model_dump(),
    }
    if deepspeed:
        resolved["deepspeed"], found = resolve_deepspeed(
            deepspeed, trainer, world, base, precision, set_by, here, notes
        )
        problems += found
    stage = zero.at(resolved["deepspeed"], "zero_optimization.stage")
    stage = int(stage) if isinstance(stage, int) else 0  # a stage of another kind is refused already
    facts = rules.Facts(
        resolved, set_by, world, stage, precision, base.modules, columns_format, hardware.gpus(), on_cpu
    )
    refused, warned = rules.apply(facts, here)
    problems += refused
    if problems:
        raise KitError(unique(problems))

    if columns_format:
        resolved["dataset"]["format"] = columns_format
    absolute(resolved)
    name = given.name or (composed.recipe or Path(given.model.name_or_path).name.replace(" ", "_"))
    digest = identity_hash(resolved, global_batch)
    return RunPlan(
        kit_version=VERSION,
        name=name,
        hash=digest,
        run_dir=str(Path(given.runs_dir).expanduser().absolute() / f"{name}-{digest}"),
        recipe=composed.recipe,
        world_size=world,
        global_batch_size=global_batch,
        precision=precision,
        **resolved,
        tracking=dict(given.tracking),
        prompts=given.prompts,
        base=identify(given.model, base.folder) if here else None,
        notes=[*notes, *(str(w.problem) + f" ({w.where}); {w.fix}" for w in warned)],
        overrides=composed.overrides,
        provenance=composed.provenance,
        composed=absolute(copy.deepcopy(tree)),
    )


def origin(provenance: dict[str, str]) -> Any:
    """A function that says where a dotted key was set; a key inside a set value is set where that value is."""

    def set_by(key: str) -> str:
        parts = re.sub(r"\[\d+\]", "", key).split(".")
        for end in range(len(parts), 0, -1):
            if at := provenance.get(".".join(parts[:end])):
                return at if at.startswith("command line") else f"{key} in {at}"
        inside = [at for k, at in provenance.items() if k.startswith(key + ".")]
        return f"{key} in {inside[0].rsplit(':', 1)[0]}" if inside and ":" in inside[0] else key

    return set_by


def located(problems: list[Problem], set_by: Any, key: str = "") -> list[Problem]:
    """Problems whose place is a dotted key (`key` where they name none), with where that key was set."""
    return [Problem(p.problem, set_by(p.where or key), p.fix, p.rule) for p in problems]


def unique(problems: list[Problem]) -> list[Problem]:
    return list({(p.problem, p.where): p for p in problems}.values())


def read_input(tree: dict[str, Any], set_by: Any) -> tuple[RunInput | None, list[Problem]]:
    """The kit's own sections through pydantic; missing values ("???") and unknown keys are named."""
    missing = [k for k, v in leaves(tree).items() if v == "???"]
    problems = [Problem(f"{k} is not given", set_by(k), f"{k}=...") for k in missing]
    try:
        given = RunInput.model_validate(tree)
        return (None if missing else given), problems
    except ValidationError as error:
        for e in error.errors():
            key = ".".join(
                str(part)
                for part in e["loc"]
                if isinstance(part, str) and not part.startswith(("function-", "literal"))
            )
            if tree_at(tree, e["loc"]) == "???":
                continue
            if e["type"] == "extra_forbidden":
                near = difflib.get_close_matches(str(e["loc"][-1]), names_at(e["loc"][:-1]), 1)
                parent = key.rpartition(".")[0]
                fix = f"did you mean {parent + '.' if parent else ''}{near[0]}?" if near else "remove it"
                problems.append(Problem(f"there is no key {key}", set_by(key), fix, "unknown-key"))
            else:
                value = f": {e['input']!r}" if not isinstance(e["input"], dict) else ""
                problems.append(Problem(f"{key}: {e['msg'][0].lower()}{e['msg'][1:]}{value}", set_by(key), "", "type"))
        return None, problems


def tree_at(tree: Any, loc: tuple[Any, ...]) -> Any:
    for part in loc:
        if not isinstance(tree, dict) or part not in tree:
            return None
        tree = tree[part]
    return tree


def names_at(loc: tuple[Any, ...]) -> list[str]:
    """The keys that are known at a place in RunInput."""
    model: type[Strict] = RunInput
    for part in loc:
        model = model.model_fields[str(part)].annotation  # type: ignore[assignment]
    return list(model.model_fields)


def read_table(values: Any, table: str, section: str, set_by: Any) -> tuple[dict[str, Any] | None, list[Problem]]:
    """A section whose keys are a library's own fields; None where it is empty."""
    if not values:
        return None, []
    if not isinstance(values, dict):
        return None, [Problem(f"{section} must hold keys", set_by(section), f"{section}=none, or {section}.KEY=VALUE")]
    if section == "peft" and "peft_type" not in values:
        named = ", ".join(f"peft.{k}" for k in values)
        return None, [
            Problem(f"peft=none, but {named} is given", set_by(f"peft.{next(iter(values))}"), "peft=lora, or drop it")
        ]
    if section == "peft" and table.upper() not in fields.peft_types():
        near = difflib.get_close_matches(table.upper(), fields.peft_types(), 1)
        known = ", ".join(fields.peft_types())
        fix = f"peft.peft_type={near[0]}" if near else f"one of {known}"
        return None, [Problem(f"there is no PEFT method {table!r}", set_by("peft.peft_type"), fix)]
    table = table.upper() if section == "peft" else table
    found = fields.check(table, values, section)
    return fields.cast(table, of_right_kind(values, found, section)), located(found, set_by)


def of_right_kind(values: dict[str, Any], found: list[Problem], section: str) -> dict[str, Any]:
    """`values` without what was refused for its kind: the rules that follow count, compare and split what is left."""
    wrong = {re.split(r"[.\[]", p.where.removeprefix(section + "."))[0] for p in found if p.rule == "kind"}
    return {key: value for key, value in values.items() if key not in wrong}


def unusable(given: RunInput, set_by: Any) -> list[Problem]:
    """Paths that the disk cannot even be asked about (rule "path"), counts below one, files that are not there."""
    problems = []
    for section, key in PATHS:
        text = getattr(getattr(given, section), key) if section else getattr(given, key)
        name = f"{section}.{key}" if section else key
        try:
            found = Path(text or ".").expanduser().exists()
            if not found and (section, key) in (("tokenizer", "chat_template"), ("launch", "script")):
                problems.append(Problem(f"there is no file {text}", set_by(name), "check the path"))
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            said = f"{name} is no path that can be looked at: {reason}"
            problems.append(Problem(said, set_by(name), "check it", "path"))
    count, held_out = given.launch.num_gpus, given.dataset.test_size
    if isinstance(count, int) and count < 1:
        said = f"launch.num_gpus must be at least 1, not {count}"
        problems.append(Problem(said, set_by("launch.num_gpus"), "launch.num_gpus=auto", "count"))
    if held_out is not None and not (0 < held_out < 1 or (held_out >= 1 and held_out == int(held_out))):
        said = f"dataset.test_size must be a share between 0 and 1 or a whole number of rows, not {held_out}"
        problems.append(Problem(said, set_by("dataset.test_size"), "dataset.test_size=0.1, or leave it out"))
    return problems


def read_trainer(values: Any, set_by: Any) -> tuple[dict[str, Any], list[Problem]]:
    """`trainer.*` against SFTConfig's fields; keys that other sections own are refused with the key to use."""
    values = dict(values) if isinstance(values, dict) else {}
    owned = [k for k in OWNED if tree_at(values, tuple(k.split("."))) is not None]
    problems = [Problem(f"trainer.{k} is not set here", set_by(f"trainer.{k}"), OWNED[k], "owned") for k in owned]
    for k in owned:
        values.pop(k.split(".")[0])
    found = fields.check("SFTConfig", values, "trainer", allow_auto={"bf16", "fp16", "use_cpu"})
    return fields.cast("SFTConfig", of_right_kind(values, found, "trainer")), problems + located(found, set_by)


def read_deepspeed(values: Any, set_by: Any) -> tuple[dict[str, Any] | None, list[Problem]]:
    """The DeepSpeed JSON: the group's choice, or `deepspeed.file` with the overrides merged on top."""
    if not values:
        return None, []
    if not isinstance(values, dict):
        return None, [
            Problem("deepspeed must hold keys", set_by("deepspeed"), "deepspeed=none, or deepspeed=FILE.json")
        ]
    values = dict(values)
    if file := values.pop("file", None):
        try:
            values = merge(zero.load(Path(os.path.expanduser(str(file)))), values)
        except KitError as error:
            return None, [Problem(p.problem, p.where or set_by("deepspeed.file"), p.fix) for p in error.problems]
    return values, located(zero.check(values), set_by)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    out = dict(below)
    for key, value in above.items():
        out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def look_at_data(dataset: Dataset, here: bool) -> tuple[str | None, list[Problem]]:
    """The data's format, from the first row of the file; None for a Hub id that is not a file."""
    problems: list[Problem] = []
    wanted: str | None = None if dataset.format == "auto" else dataset.format
    for key, path in (("dataset.path", dataset.path), ("dataset.eval_path", dataset.eval_path)):
        if path is None or (paths.made_by_quickstart(path) and not Path(path).exists() and not here):
            continue
        try:
            columns = data_files.peek(path)
            if columns is not None:
                wanted = data_files.detect_format(columns, dataset.columns, dataset.format)
        except KitError as error:
            problems += [
                Problem(p.problem, key if p.where == "dataset.path" else p.where, p.fix) for p in error.problems
            ]
    return wanted, problems


def resolve_launch(
    launch: Launch, trainer: dict[str, Any], deepspeed: bool, here: bool, world: int | None, notes: list[str]
) -> tuple[Launch, bool]:
    """The launcher, the process count, and whether it is on CPU."""
    gpus = len(hardware.gpus())
    on_cpu = trainer.get("use_cpu", "auto")
    count = world or launch.num_gpus
    if on_cpu == "auto":
        # A count that was asked for on a machine without GPUs is meant for another machine.
        on_cpu = gpus == 0 and (count == "auto" or (world is not None))
    if not on_cpu and gpus == 0 and not here:
        notes.append("no GPU on this machine: planned for one that has them, with bfloat16")
    if count == "auto":
        count = 1 if on_cpu or launch.launcher == "local" else max(gpus, 1)
    launcher = launch.launcher
    # Ranks that a launcher has already started are no plain process, whatever the recipe would start.
    if launcher == "auto" or (launcher == "local" and (world or 1) > 1):
        launcher = "local" if count == 1 else ("deepspeed" if deepspeed else "torchrun")
    return launch.model_copy(update={"launcher": launcher, "num_gpus": count}), bool(on_cpu)


def resolve_precision(trainer: dict[str, Any], on_cpu: bool, notes: list[str]) -> Any:
    """Set trainer.bf16 and trainer.fp16 to plain values; `auto` is what the hardware is fast at."""
    asked = {flag: trainer.get(flag, "auto") for flag in PRECISIONS}
    if True in asked.values():
        chosen = "bf16" if asked["bf16"] is True else "fp16"
    elif "auto" not in asked.values():
        chosen = None
    elif on_cpu:
        chosen = "bf16" if asked["bf16"] == "auto" and hardware.cpu_multiplies_bf16() else None
    else:
        old = any(g.capability and g.capability < (8, 0) for g in hardware.gpus())
        chosen = "fp16" if old and asked["fp16"] == "auto" else ("bf16" if asked["bf16"] == "auto" else None)
    for flag in PRECISIONS:
        # Both true is left as it is for the rule that refuses it.
        trainer[flag] = True if asked[flag] is True else flag == chosen
    return PRECISIONS.get(chosen or "", "float32")


def load_dtype(asked: str, precision: str, peft: bool, deepspeed: bool) -> Any:
    """The dtype of the loaded weights: fp16 without DeepSpeed needs float32 weights where they train."""
    if asked != "auto":
        return asked
    return "float32" if precision == "float16" and not (peft or deepspeed) else precision


def resolve_batch(
    trainer: dict[str, Any], wanted: int | None, world: int, set_by: Any, provenance: dict[str, str]
) -> tuple[int, list[Problem]]:
    """rows per optimizer step = per_device_train_batch_size x gradient_accumulation_steps x processes."""
    micro, steps = trainer.get("per_device_train_batch_size", 8), trainer.get("gradient_accumulation_steps", 1)
    if not all(isinstance(n, int) and n > 0 for n in (micro, steps)):
        return 1, []  # the field tables have refused it already
    if wanted is None:
        return micro * steps * world, []
    # The group's own 1 is a default; a value from anywhere else was meant.
    given = not provenance.get("trainer.gradient_accumulation_steps", "trainer/").startswith("trainer/")
    if given and micro * steps * world != wanted:
        return wanted, [
            Problem(
                f"global_batch_size={wanted} is not {micro} rows x {steps} accumulation steps x {world} processes",
                set_by("global_batch_size"),
                "leave out trainer.gradient_accumulation_steps: it is derived",
            )
        ]
    if wanted % (micro * world):
        # The largest that divides; nobody asks for more than 4096 rows per process.
        fits = [m for m in range(1, min(micro, 4096) + 1) if wanted % (m * world) == 0]
        fix = (
            f"trainer.per_device_train_batch_size={fits[-1]}"
            if fits
            else f"global_batch_size={math.ceil(wanted / (micro * world)) * micro * world}"
        )
        return wanted, [
            Problem(
                f"global_batch_size={wanted} does not divide by {micro} rows x {world} processes",
                set_by("global_batch_size"),
                fix,
                "batch",
            )
        ]
    trainer["gradient_accumulation_steps"] = wanted // (micro * world)
    return wanted, []


def resolve_deepspeed(
    deepspeed: dict[str, Any],
    trainer: dict[str, Any],
    world: int,
    base: Base,
    precision: Any,
    set_by: Any,
    here: bool,
    notes: list[str],
) -> tuple[dict[str, Any], list[Problem]]:
    """Every "auto" of the JSON as a plain value; a literal that disagrees with the trainer is a problem.

    For another machine the width of a model that is not here may stay unknown: it is said, not guessed.
    """
    try:
        return zero.resolve(
            deepspeed, trainer=trainer, world_size=world, hidden_size=base.hidden_size, precision=precision
        ), []
    except KitError as error:
        unknown = [p for p in error.problems if p.rule == "hidden-size"]
        if unknown and not here:
            notes.append(f"{unknown[0].problem}; resolved when the run starts")
            return deepspeed, located([p for p in error.problems if p not in unknown], set_by)
        return deepspeed, located(error.problems, set_by)


def absolute(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with local paths made absolute, in place: workers start elsewhere, a resume may too (T80)."""
    for section, keys in (
        ("model", ["name_or_path"]),
        ("tokenizer", ["name_or_path", "chat_template"]),
        ("dataset", ["path", "eval_path"]),
        ("launch", ["script"]),
        ("deepspeed", ["file"]),
    ):
        held = tree.get(section) or {}
        for key in keys:
            if held.get(key) and (path := Path(str(held[key])).expanduser()).exists():
                held[key] = str(path.absolute())
    return tree
