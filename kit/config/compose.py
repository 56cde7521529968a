"""Hydra in, a plain tree out. Beside it only multirun.py and search_space.py see Hydra."""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra import main as hydra_main
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kit.config.data_words import (
    HUB_ID,
    data_overrides,
    dataset_overrides,
    is_data_word,
    is_run,
    is_there,
    require_data,
)
from kit.config.deepspeed.check import load_deepspeed_file
from kit.config.libyaml import parse_with_libyaml
from kit.config.provenance import GROUPS, RUN_FILE, Layer, read_deepspeed_file_layer, read_layers
from kit.errors import KitError, Problem
from kit.system import paths


@dataclass
class Composed:
    """The composed tree as plain dicts and lists, and where each key was set."""

    tree: dict[str, Any]
    overrides: list[str] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)
    recipe: str | None = None
    layers: list[Layer] = field(default_factory=list)  # each goes over those before it


def compose(args: list[str], config_dir: str | None = None) -> Composed:
    """Compose `[run.yaml] [DATA ...] key=value ...` without running it; KitError for what Hydra itself refuses."""
    register_with_hydra()
    folders = [Path(config_dir)] if config_dir else []
    overrides, run_file = parse_overrides(args, folders=folders)
    return compose_overrides(overrides, run_file, folders, args)


def compose_overrides(overrides: list[str], run_file: Path | None, folders: list[Path], args: list[str]) -> Composed:
    """The same from what read_args gave; `folders` hold groups and recipes of a user's own, `args` were typed."""
    own = ",".join(f"file://{folder.absolute()}" for folder in folders)
    searchpath = [f"hydra.searchpath=[{own}]"] if own else []
    GlobalHydra.instance().clear()
    try:
        with parse_with_libyaml(), initialize_config_dir(str(paths.CONF), "kit", version_base="1.3"):
            cfg = hydra_compose("train", overrides=[*searchpath, *overrides], return_hydra_config=True)
        return to_composed(cfg, cfg.hydra, overrides, run_file)
    except (HydraException, OmegaConfBaseException, OSError, yaml.YAMLError) as error:
        raise hydra_refusal(error, args) from None
    except (TypeError, ValueError, RecursionError) as error:  # Hydra's own code on what it did not expect
        raise hydra_type_error(error, args) from None
    finally:
        GlobalHydra.instance().clear()


def ignore_composed(composed: Composed) -> None:
    """For the flags with which Hydra only prints: help and shell completion."""


def run_hydra(args: list[str], task: Callable[[Composed], None] = ignore_composed) -> int:
    """Hand the command line to Hydra's own main, for its flags (`-m`, `--cfg`, `--info`, ...); `task` runs per job."""
    register_with_hydra()
    overrides, run_file = parse_overrides([a for a in args if not a.startswith("-")], flags=args)
    flags = [a for a in args if a.startswith("-") or a in values_of_flags(args)]

    def job(cfg: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        task(to_composed(cfg, hydra, [str(o) for o in hydra.overrides.task], run_file))

    argv, sys.argv = sys.argv, ["kit train", *flags, *overrides]
    try:
        # kit.errors travel through `task`; what reaches here is Hydra's own refusal, already printed by it.
        hydra_main(config_path=str(paths.CONF), config_name="train", version_base="1.3")(job)()
    except SystemExit as stop:
        return int(stop.code or 0) if not isinstance(stop.code, str) else 2
    finally:
        sys.argv = argv
    return 0


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A composed tree with `key=value` overrides on top, as `kit resume RUN key=value` needs it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    cfg = OmegaConf.create(tree)
    try:
        for override in OverridesParser.create().parse_overrides(overrides):
            if override.is_delete() or override.is_sweep_override():
                raise KitError(f"{override.input_line} cannot be used here", fix="give key=value", rule="override")
            OmegaConf.update(cfg, override.key_or_group, override.value(), force_add=True)
        return to_plain_tree(cfg)
    except (HydraException, OmegaConfBaseException) as error:
        raise hydra_refusal(error, overrides) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise hydra_type_error(error, overrides) from None


def register_with_hydra() -> None:
    """Make ds_configs/*.json the group `deepspeed`, and `${kit.dir:...}` known."""
    OmegaConf.register_new_resolver("kit.dir", paths.resolve_kit_dir, replace=True)
    logging.getLogger("hydra").setLevel(logging.ERROR)
    register_deepspeed_group(paths.DS_CONFIGS)


@functools.lru_cache(maxsize=1)  # Hydra's store holds the files of one folder: the last
def register_deepspeed_group(folder: Path) -> None:
    store = ConfigStore.instance()
    for file in sorted(folder.glob("*.json")):
        store.store(group="deepspeed", name=file.stem, node=OmegaConf.create(load_deepspeed_file(file)))


def parse_overrides(
    args: list[str], flags: list[str] | None = None, folders: Sequence[Path] = ()
) -> tuple[list[str], Path | None]:
    """Overrides in Hydra's grammar from what people type, and the run.yaml if one was named.

    The composed tree is in struct mode, so `trainer.eval_steps=5` would need a `+`. Every value override becomes `++`:
    unknown keys are refused by our own schema, all at once and with a suggestion. `folders`: a user's own groups.
    """
    overrides: list[str] = []
    run_file: Path | None = None
    data: list[str] = []
    taken = values_of_flags(flags or [])
    folders = [*folders, *config_folders(flags or [])]
    for arg in args:
        if arg in taken:
            continue
        key, equals, value = arg.partition("=")
        if is_data_word(arg):
            data.append(arg)
        elif not equals and not key.startswith("~"):
            if not key.endswith((".yaml", ".yml")) or run_file is not None:
                raise not_an_override(arg, next(iter(args[args.index(arg) + 1 :]), ""))
            run_file = Path(key)
        elif key == "dataset" and (chosen := dataset_overrides(value, folders)):
            overrides += chosen
        elif key == "deepspeed" and value.strip("\"'").endswith(".json"):
            overrides += ["deepspeed=none", f"++deepspeed.file={value}"]
        elif key[:1] in ("+", "~") or key in GROUPS or any(c in key for c in "@/") or key.split(".")[0] == "hydra":
            overrides.append(arg)
        else:
            overrides.append("++" + arg)
    keys = {o.partition("=")[0].lstrip("+") for o in overrides}
    if data:
        overrides += data_overrides(data)
        refuse_second_dataset(data, args)
        keys |= {"dataset", "dataset.path"}
    if "deepspeed.file" in keys and "deepspeed" not in keys:
        overrides.insert(0, "deepspeed=none")  # a file of one's own replaces the recipe's choice
    if run_file is not None:
        overrides = [*store_run_file(run_file, keys, folders), *overrides]
    return overrides, run_file


def not_an_override(arg: str, after: str = "") -> KitError:
    """Say what is meant by a word that is none of the kit's; `after`: the next one, its value in `key value`."""
    if (
        (folder := os.path.dirname(arg)) and is_there(folder) and not is_there(arg)
    ):  # a path into a folder that is here
        require_data(arg)
    if is_run(arg):
        return KitError(f"{arg} is a run: its values stand", "command line", f"kit resume {arg}", rule="override")
    fix = f"dataset={arg}" if HUB_ID.fullmatch(arg) else "give key=value"
    if re.fullmatch(r"[\w.-]+", arg):
        from kit.config.pointers import suggest_words

        recipes = difflib.get_close_matches(arg, group_options("recipe"), 1)
        value = "VALUE" if "=" in after or not after or after.startswith("-") else after
        fix = f"recipe={recipes[0]}" if recipes else suggest_words(arg, value) or fix
    return KitError(f"{arg!r} is neither key=value, a YAML file nor data", "command line", fix, rule="override")


def refuse_second_dataset(data: list[str], args: list[str]) -> None:
    """Refuse `my.jsonl` beside `dataset=` or `dataset.path=`: either could be meant."""
    if other := next((a for a in args if a.partition("=")[0] in ("dataset", "dataset.path") and a not in data), None):
        fix = "keep one of them"
        if other.startswith("dataset="):
            fix += f"; the preset with your file in it: {other} dataset.path={data[0]}"
        raise KitError(f"both {data[0]} and {other} say which data", "command line", fix, rule="data-word")


def store_run_file(path: Path, given: set[str], folders: Sequence[Path] = ()) -> list[str]:
    """Put a user's run.yaml in place of a recipe; `deepspeed: zero2` in it chooses a group as on the command line.

    So does `dataset: my.jsonl`, or a list of files, which is dataset.path.
    """
    if "recipe" in given:
        raise KitError(
            f"both {path} and recipe= are given",
            where="command line",
            fix="name the recipe inside the file",
            rule="run-file",
        )
    try:
        tree = OmegaConf.load(path)
    except FileNotFoundError:
        raise KitError(
            f"there is no file {path}",
            "command line",
            "check the path; it is taken from where you stand",
            rule="run-file",
        ) from None
    except RecursionError:
        raise KitError(f"{path} is nested too deeply", str(path), "write it flat", rule="run-file") from None
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        text = f"{path} is not YAML: {' '.join(str(error).split())}"
        raise KitError(text, str(path), "mend the line", rule="run-file") from None
    if not isinstance(tree, DictConfig):
        raise KitError(f"{path} must hold key: value lines", str(path), "trainer:\n  max_steps: 10", rule="run-file")
    content: dict[str, Any] = OmegaConf.to_container(tree)  # type: ignore[assignment]
    if not any(isinstance(content.get(name), dict) for name in (*GROUPS, "launch")):
        from kit.config.pointers import refuse_foreign_file  # the tables of other tools, which other runs need not

        refuse_foreign_file(path, content)
    choices: list[str] = []
    files = content.get("dataset")
    if isinstance(files, str) and dataset_overrides(files, folders):
        files = [files]
    if isinstance(files, list) and all(isinstance(f, str) for f in files):
        content["dataset"] = {"path": files[0] if len(files) == 1 else files}
        if not given & {"dataset", "dataset.path"}:
            for file in files:
                require_data(file, f"dataset in {path}")
            choices.append("dataset=none")
    for group in GROUPS:
        if isinstance(choice := content.get(group), str):
            del content[group]
            if group == "recipe":
                content["defaults"] = [choice, *content.get("defaults", ["_self_"])]
            elif group not in given:
                choices += parse_overrides([f"{group}={choice}"])[0]
    name = RUN_FILE + re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)  # never the name of a shipped recipe
    ConfigStore.instance().store(group="recipe", name=name, node=OmegaConf.create(content), package="_global_")
    return [*choices, f"recipe={name}"]


def values_of_flags(args: list[str]) -> set[str]:
    """The words behind Hydra's flags that take one: `--config-dir DIR`, `--cfg job`, ..."""
    takes = {"--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"}
    return {b for a, b in zip(args, args[1:], strict=False) if a in takes} | {
        b for a, b in zip(args, args[1:], strict=False) if a in ("--info", "-i") and re.fullmatch(r"[a-z-]+", b)
    }


def config_folders(flags: list[str]) -> list[Path]:
    """The folders behind Hydra's `--config-dir`."""
    names = ("--config-dir", "-cd")
    after = [b for a, b in zip(flags, flags[1:], strict=False) if a in names]
    return [Path(f) for f in (*after, *(f.partition("=")[2] for f in flags if f.partition("=")[0] in names)) if f]


def to_composed(cfg: DictConfig, hydra: Any, overrides: list[str], run_file: Path | None) -> Composed:
    """The plain tree of a composed config, with the origin of every key."""
    runtime = hydra.runtime
    choices = {str(k): v for k, v in runtime.choices.items() if not str(k).startswith("hydra/")}
    sources = [Path(s.path) for s in runtime.config_sources if s.schema == "file"]
    with contextlib.suppress(Exception):
        OmegaConf.set_struct(cfg, False)
    OmegaConf.set_readonly(cfg, False)
    cfg.pop("hydra", None)  # a copy without it would cost as much as all other work here
    tree = to_plain_tree(cfg)
    if isinstance(data := tree.get("dataset"), dict) and data.get("mix") and data.get("path") == "???":
        data["path"] = None  # the sets of the mix have theirs
    recipe = run_file.stem if run_file is not None else choices.get("recipe")
    below = read_layers(choices, sources, run_file)
    # The file is lowest: what a recipe or the command line says goes on top.
    own = read_deepspeed_file_layer(tree.get("deepspeed"))
    provenance = {key: place for layer in [own, *below] for key, (place, _) in layer.items()}
    typed: Layer = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals and key not in GROUPS:
            typed[key.lstrip("+")] = (f"command line: {override.lstrip('+')}", value)
    provenance |= {key: place for key, (place, _) in typed.items()}
    return Composed(tree, overrides, provenance, None if recipe in (None, "null") else recipe, [*below, typed])


def to_plain_tree(cfg: DictConfig) -> dict[str, Any]:
    """Interpolations resolved, only JSON types left; what is missing stays "???" for the schema to name."""
    tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    return json.loads(json.dumps(tree))


def hydra_refusal(error: Exception, args: list[str]) -> KitError:
    """Hydra's and OmegaConf's refusals in our words: the problem and what to type instead."""
    text = " ".join(str(error).split("Available options")[0].split())
    choice = re.search(r"Could not find '([\w-]+)/([^']+)'", text)
    if choice:
        group, name = choice.groups()
        names = group_options(group)
        close = difflib.get_close_matches(name, names, 1)
        from kit.config.pointers import suggest_choice

        fix = f"{meant}; " if (meant := suggest_choice(group, name)) else ""
        fix = fix or (f"did you mean {group}={close[0]}? " if close else "")
        return KitError(
            f"there is no {group} named {name!r}",
            f"command line: {group}={name}",
            f"{fix}known: {', '.join(names)}",
            rule="group-choice",
        )
    variable = re.search(r"Environment variable '(\w+)' not found", text)
    if variable:
        problem = f"the environment variable {variable[1]} is not set"
        return KitError(problem, fix=f"export {variable[1]}=...", rule="environment-variable")
    if several := re.search(r"Ambiguous value for argument '\+*([^=']+)=(.*?)' 1\. ", text):
        problem = f"{several[1]} is given several values: {several[2]}"
        fix = f"-m tries each in a run of its own; one list is {several[1]}=[{several[2]}]"
        return KitError(problem, "command line", fix, rule="override")
    culprit = next((a for a in args if a and a in text), "command line")
    if "LexerNoViableAlt" in text or "ParserNoViableAlt" in text:  # the parser's own words tell a user nothing
        text = "the value has a character that Hydra's grammar takes only between quotes"
    return KitError(
        [
            Problem(
                text, culprit, "Hydra's override grammar: key=value, key=[a,b], key={a:1}, 'key=\"a b\"'", "override"
            )
        ]
    )


def hydra_type_error(error: Exception, args: list[str]) -> KitError:
    """Hydra checks few kinds of values itself: `launch=1` is a TypeError somewhere inside it."""
    for arg in args:
        group, equals, value = arg.lstrip("+~").partition("=")
        odd = value == "null" or not re.fullmatch(r"[A-Za-z][\w./-]*", value.strip("\"'"))
        if equals and group in GROUPS and odd:
            names = ", ".join(group_options(group))
            from kit.config.pointers import suggest_choice

            problem = f"{group}={value} names no choice of {group}"
            fix = f"{meant}; " if (meant := suggest_choice(group, value)) else ""
            return KitError(problem, f"command line: {arg}", f"{fix}known: {names}", rule="group-choice")
    if isinstance(error, RecursionError):
        problem = "a value is nested too deeply"
        return KitError(problem, "command line", "leave out the inner brackets", rule="override")
    text = " ".join(str(error).split())
    return KitError(f"the overrides cannot be composed: {text}", "command line", "check the values", rule="override")


def group_options(group: str) -> list[str]:
    """The names that `group=` can take from the kit's own folders."""
    names = {f.stem for f in (paths.CONF / group).glob("*.yaml")}
    if group == "deepspeed":
        names |= {f.stem for f in paths.DS_CONFIGS.glob("*.json")}
    return sorted(names)
