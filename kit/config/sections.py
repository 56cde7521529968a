"""The sections of a composed tree, each against its schema; every problem with where its key was set."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from pydantic import ValidationError

from kit.config.deepspeed import resolve as zero
from kit.config.kinds import fix_of, is_kind
from kit.errors import KitError, Problem, named
from kit.inspection import dataset as data_files
from kit.inspection import dataset_template as templates
from kit.inspection import hub_dataset
from kit.schema import fields
from kit.schema.run_plan import Dataset, RunInput, Strict, leaves
from kit.system import paths

PATHS = (  # (section, key) of what is looked for on the disk
    ("model", "name_or_path"), ("model", "revision"), ("tokenizer", "name_or_path"), ("tokenizer", "chat_template"),
    ("dataset", "path"), ("dataset", "eval_path"), ("launch", "script"), ("launch", "hostfile"), ("", "runs_dir"),
)  # fmt: skip
FSDP = (  # what transformers' _process_fsdp_args reads, with or without "fsdp_" before it
    "version", "cpu_offload", "auto_wrap_policy", "min_num_params", "transformer_layer_cls_to_wrap",
    "cpu_ram_efficient_loading", "state_dict_type", "activation_checkpointing", "reshard_after_forward",
    "forward_prefetch", "backward_prefetch", "use_orig_params", "sync_module_states",
)  # fmt: skip
OWNED = {  # fields of SFTConfig that another part of the description holds
    "output_dir": "the run directory holds everything: runs_dir=FOLDER, name=NAME",
    "deepspeed": "deepspeed=zero2, or deepspeed=/path/my.json",
    "fsdp": "use the group fsdp",
    "fsdp_config": "use the group fsdp",
    "hub_token": "secrets come from the environment: export HF_TOKEN=...",
    "push_to_hub_token": "secrets come from the environment: export HF_TOKEN=...",
    "resume_from_checkpoint": "kit resume RUN",
    "chat_template_path": "tokenizer.chat_template=NAME or FILE.jinja, with tokenizer.added_tokens=[...]",
    "eos_token": "tokenizer.eos_token=...",
    "pad_token": "tokenizer.pad_token=...",
    "model_init_kwargs.dtype": "model.dtype=...",
}


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


def chosen_by_person(provenance: dict[str, str]) -> Callable[[str], bool]:
    """A function that says whether a dotted key was set by a recipe, a file or the command line, and not by a group
    of the kit's own, whose values are defaults."""
    return lambda key: not provenance.get(key, f"{key.split('.')[0]}/").startswith(f"{key.split('.')[0]}/")


def located(problems: list[Problem], set_by: Any, key: str = "") -> list[Problem]:
    """Problems whose place is a dotted key (`key` where they name none), with where that key was set."""
    return [Problem(p.problem, set_by(p.where or key), p.fix, p.rule) for p in problems]


def unique(problems: list[Problem]) -> list[Problem]:
    return list({(p.problem, p.where): p for p in problems}.values())


def read_input(tree: dict[str, Any], set_by: Any) -> tuple[RunInput | None, list[Problem]]:
    """The kit's own sections through pydantic; missing values ("???") and unknown keys are named."""
    missing = [k for k, v in leaves(tree).items() if v == "???"]
    problems = [Problem(f"{k} is not given", set_by(k), f"{k}=...", "missing") for k in missing]
    try:
        given = RunInput.model_validate(tree)
        return (None if missing else given), problems
    except ValidationError as error:
        wanted: dict[str, tuple[str, list[Any]]] = {}  # where a key takes one kind or another, each has its complaint
        for e in error.errors():
            key = ".".join(str(part) for part in e["loc"] if isinstance(part, str) and not is_kind(part))
            if tree_at(tree, e["loc"]) == "???":
                continue
            if e["type"] == "extra_forbidden":
                near = difflib.get_close_matches(str(e["loc"][-1]), names_at(e["loc"][:-1]), 1)
                parent = key.rpartition(".")[0]
                fix = f"did you mean {parent + '.' if parent else ''}{near[0]}?" if near else "remove it"
                problems.append(Problem(f"there is no key {key}", set_by(key), fix, "unknown-key"))
            else:
                value = f": {e['input']!r}" if not isinstance(e["input"], dict) else ""
                said = f"{key}: {e['msg'][0].lower()}{e['msg'][1:]}{value}"
                wanted.setdefault(key, (said, []))[1].append(e)
        for key, (said, errors) in wanted.items():
            problems.append(Problem(said, set_by(key), fix_of(key, errors), "type"))
        return None, problems


def not_finite(tree: Any, set_by: Any) -> list[Problem]:
    """Infinite numbers and NaN, wherever they stand."""

    def numbers(value: Any) -> Iterator[float]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for one in inner:
            yield from numbers(one)
        if isinstance(value, float):
            yield value

    bad = [key for key, value in leaves(tree).items() if not all(map(math.isfinite, numbers(value)))]
    return [Problem(f"{key} holds a number that is not finite", set_by(key), "give a number", "range") for key in bad]


def read_fsdp(values: Any, set_by: Any) -> list[Problem]:
    """The group `fsdp`: a name that transformers never reads would shard otherwise than was meant."""
    problems = []
    for key, value in (values or {}).items() if isinstance(values, dict) else ():
        name, at = str(key).removeprefix("fsdp_"), set_by(f"fsdp.{key}")
        if name not in FSDP:
            near = difflib.get_close_matches(name, FSDP, 1)
            fix = f"did you mean fsdp.{near[0]}?" if near else f"one of {', '.join(FSDP)}"
            problems.append(Problem(f"unknown key fsdp.{key}", at, fix, "unknown-key"))
        elif name == "auto_wrap_policy" and value not in ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"):
            fix = "TRANSFORMER_BASED_WRAP, SIZE_BASED_WRAP or NO_WRAP"
            problems.append(Problem(f"fsdp.{key} is {value!r}", at, fix, "choice"))
        elif name == "version" and value not in (1, 2):
            problems.append(Problem(f"fsdp.{key} must be 1 or 2, not {value!r}", at, "fsdp.version=2", "choice"))
    return problems


def read_slurm(settings: dict[str, Any]) -> dict[str, Any]:
    """launch.slurm by itself, complete; KitError with every key that there is not and every value of a wrong kind."""
    stub = {"model": {"name_or_path": ""}, "dataset": {"path": ""}, "launch": {"slurm": settings}}
    given, problems = read_input(stub, lambda key: f"command line: {key}")
    if given is None or given.launch.slurm is None:
        raise KitError(problems)
    return given.launch.slurm.model_dump()


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
        kind = model.model_fields[str(part)].annotation
        model = next(m for m in (*get_args(kind), kind) if m is not NoneType)  # a section may be null
    return list(model.model_fields)


def read_table(
    values: Any, table: str, section: str, set_by: Any, allow_auto: Collection[str] = ()
) -> tuple[dict[str, Any] | None, list[Problem]]:
    """A section whose keys are a library's own fields; None where it is empty. `allow_auto`: see fields.check."""
    if not values:
        return None, []
    if not isinstance(values, dict):
        fix = f"{section}=none, or {section}.KEY=VALUE"
        return None, [Problem(f"{section} must hold keys", set_by(section), fix, "section")]
    if section == "peft" and values.get("peft_type") is None:
        keys = ", ".join(f"peft.{k}" for k in values)
        at = set_by(f"peft.{next(iter(values))}")
        return None, [Problem(f"peft=none, but {keys} is given", at, "peft=lora, or drop it", "peft-none")]
    if section == "peft" and table.upper() not in fields.peft_types():
        near = difflib.get_close_matches(table.upper(), fields.peft_types(), 1)
        known = ", ".join(fields.peft_types())
        fix = f"peft.peft_type={near[0]}" if near else f"one of {known}"
        return None, [Problem(f"there is no PEFT method {table!r}", set_by("peft.peft_type"), fix, "peft-type")]
    table = table.upper() if section == "peft" else table
    found = fields.check(table, values, section, allow_auto)
    return fields.cast(table, of_right_kind(values, found, section)), located(found, set_by)


def of_right_kind(values: dict[str, Any], found: list[Problem], section: str) -> dict[str, Any]:
    """`values` without what was refused for its kind or size: the rules compute with what is left."""
    wrong = {re.split(r"[.\[]", p.where.removeprefix(section + "."))[0] for p in found if p.rule in ("kind", "range")}
    return {key: value for key, value in values.items() if key not in wrong}


def unusable(given: RunInput, set_by: Any) -> list[Problem]:
    """Paths that the disk cannot even be asked about (rule "path"), counts below one, files that are not there."""
    problems = []
    for section, key in PATHS:
        text = getattr(getattr(given, section), key) if section else getattr(given, key)
        name = f"{section}.{key}" if section else key
        try:
            found = Path(text or ".").expanduser().exists()
            if not found and (section, key) == ("launch", "script"):
                problems.append(Problem(f"there is no file {text}", set_by(name), "check the path", "script"))
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            said = f"{name} is no path that can be looked at: {reason}"
            problems.append(Problem(said, set_by(name), "check it", "path"))
    for key, count in (("num_gpus", given.launch.num_gpus), ("num_nodes", given.launch.num_nodes)):
        if isinstance(count, int) and count < 1:
            said = f"launch.{key} must be at least 1, not {count}"
            problems.append(Problem(said, set_by(f"launch.{key}"), f"launch.{key}=auto", "count"))
    for name, value, own in (("split", given.dataset.split, "train"), ("eval_split", given.dataset.eval_split, None)):
        if value != own and Path(given.dataset.path).expanduser().exists():
            said = f"dataset.{name}={value}, but {given.dataset.path} is a file or folder, which has no splits"
            fix = "dataset.eval_path=FILE, or dataset.test_size=0.1"
            problems.append(Problem(said, set_by(f"dataset.{name}"), fix, "dataset-split"))
    return problems + split_sizes(given.dataset, set_by)


def split_sizes(dataset: Dataset, set_by: Any) -> list[Problem]:
    """What is wrong with the parts that are to be held out."""
    problems = []
    sizes = {"test_size": dataset.test_size, "validation_size": dataset.validation_size}
    for name, size in sizes.items():
        if size is not None and not (0 < size < 1 or (size >= 1 and size == int(size))):
            said = f"dataset.{name} must be a share between 0 and 1 or a whole number of rows, not {size}"
            fix = f"dataset.{name}=0.1, or leave it out"
            problems.append(Problem(said, set_by(f"dataset.{name}"), fix, "held-out"))
    if problems or dataset.validation_size is None:
        return problems
    key = set_by("dataset.validation_size")
    if dataset.test_size is None:
        said, fix = "dataset.validation_size without dataset.test_size", "dataset.test_size holds rows out"
        return [Problem(said, key, fix, "held-out")]
    if (dataset.test_size < 1) != (dataset.validation_size < 1):
        said = "one of test_size and validation_size is a share, the other a number"
        return [Problem(said, key, "give one kind", "held-out")]
    if dataset.test_size < 1 <= dataset.test_size + dataset.validation_size:
        return [Problem("test_size and validation_size leave no rows to train on", key, "0.1 and 0.1", "held-out")]
    return []


def read_trainer(values: Any, set_by: Any, section: str = "trainer") -> tuple[dict[str, Any], list[Problem]]:
    """`trainer.*` against SFTConfig's fields; keys that other sections own are refused with the key to use."""
    values = dict(values) if isinstance(values, dict) else {}
    owned = [k for k in OWNED if tree_at(values, tuple(k.split("."))) is not None]
    problems = [Problem(f"{section}.{k} is not set here", set_by(f"{section}.{k}"), OWNED[k], "owned") for k in owned]
    for k in owned:
        values.pop(k.split(".")[0], None)
    found = fields.check("SFTConfig", values, section, allow_auto={"bf16", "fp16", "use_cpu"})
    return fields.cast("SFTConfig", of_right_kind(values, found, section)), problems + located(found, set_by)


def read_deepspeed(values: Any, set_by: Any) -> tuple[dict[str, Any] | None, list[Problem]]:
    """The DeepSpeed JSON: the group's choice, or `deepspeed.file` with the overrides merged on top."""
    if not values:
        return None, []
    if not isinstance(values, dict):
        fix = "deepspeed=none, or deepspeed=FILE.json"
        return None, [Problem("deepspeed must hold keys", set_by("deepspeed"), fix, "section")]
    values = dict(values)
    if file := values.pop("file", None):
        try:
            values = merge(zero.load(Path(os.path.expanduser(str(file)))), values)
        except KitError as error:
            at = set_by("deepspeed.file")
            found = [Problem(p.problem, p.where or at, p.fix, p.rule) for p in error.problems]
            return None, named(found, "deepspeed-file")
    return values, located(zero.check(values), set_by)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    out = dict(below)
    for key, value in above.items():
        out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def look_at_data(dataset: Dataset, here: bool) -> tuple[str | None, list[Problem]]:
    """The data's format, from the first row of the file; None for a Hub id that is not in the cache."""
    problems: list[Problem] = []
    wanted: str | None = None if dataset.format == "auto" else dataset.format
    if dataset.template:  # can be read without the data
        try:
            made = templates.format_of(dataset.template)
            wanted = made if wanted is None or made != "messages" else wanted
            templates.columns_of(dataset.template)
        except KitError as error:
            return None, named(error.problems, "dataset-template")
    for key, path in (("dataset.path", dataset.path), ("dataset.eval_path", dataset.eval_path)):
        if path is None or (paths.made_by_quickstart(path) and not Path(path).exists() and not here):
            continue
        try:
            if (files := data_files.find_files(path)) is None:
                revision = dataset.revision if path == dataset.path else None
                columns = hub_dataset.columns(dataset, path, revision, here)
            else:
                columns = data_files.columns(files, path)
            if columns is not None:
                wanted = data_files.detect_format(columns, dataset)
        except KitError as error:
            at = [Problem(p.problem, key if p.where == "dataset.path" else p.where, p.fix, p.rule)
                  for p in error.problems]  # fmt: skip
            problems += named(at, "dataset-unreadable")
    return wanted, problems
