"""What is typed in place of a data set: `kit train my.jsonl`, and `dataset=my.jsonl`, as `dataset.path`."""

from __future__ import annotations

import difflib
import glob
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from kit.config.provenance import GROUPS
from kit.errors import KitError
from kit.inspection.hub_dataset import PACKINGS, SUFFIXES
from kit.schema.run_plan import RunInput
from kit.system import paths

SUFFIX = re.compile(rf"({'|'.join(SUFFIXES)})({'|'.join(PACKINGS)})?$".replace(".", r"\."), re.IGNORECASE)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*\.[A-Za-z]+")  # what Hydra's grammar takes as text without quotes
QUOTED = re.compile(r"""\s*("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')\s*""", re.DOTALL)
SWEEP = re.compile(r"(choice|glob|range|interval|shuffle|sort|tag)\(")
MOST_NAMES = 10_000  # of a folder, looked through for the name that was meant


def is_data_word(word: str) -> bool:
    """Tell whether a word of the command line is data: a file, a folder, a glob, or a name that ends as data do."""
    key, equals, _ = word.partition("=")
    head = re.split(r"[./@]", key.lstrip("+~"))[0]
    if word.startswith("-") or word.endswith((".yaml", ".yml")) or (equals and is_section(head)):
        return False
    if equals or (word.startswith("~") and not word.startswith("~/")):  # else an override of a key that is misspelt
        return bool(SUFFIX.search(word)) and is_there(word)
    if is_run(word) or is_there(str(paths.RECIPES / f"{word}.yaml")):
        return False
    return bool(SUFFIX.search(word)) or is_there(word) or matches_files(word)


def is_section(name: str) -> bool:
    return name in RunInput.model_fields or name in GROUPS or name == "hydra"


def is_run(word: str) -> bool:
    """Tell whether a word is a run directory, whose plan stands."""
    return is_there(os.path.join(word, "plan.json"))


def is_there(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # a name too long, ~nobody, a NUL byte
        return False


def matches_files(path: str) -> bool:
    try:
        found = glob.iglob(os.path.expanduser(path), recursive=True) if re.search(r"[*?[]", path) else iter(())
        return next(found, None) is not None
    except (OSError, ValueError, re.error):
        return False


def names_data(text: str) -> bool:
    """Tell whether `dataset=TEXT`, which is the name of no preset, is data; it may be a Hub id too."""
    return bool(SUFFIX.search(text) or HUB_ID.fullmatch(text)) or is_there(text) or matches_files(text)


def require_data(path: str, where: str = "command line") -> None:
    """Refuse a data file that does not exist, with the names beside it that may be meant."""
    folder, _, name = path.rpartition("/")
    hub = bool(HUB_ID.fullmatch(path)) and not SUFFIX.search(path)
    if is_there(path) or matches_files(path) or (hub and not is_there(folder)):
        return
    fix = "check the path; it is taken from where you stand"
    try:
        with os.scandir(os.path.expanduser(folder or ("/" if path.startswith("/") else "."))) as found:
            names = sorted(e.name for e in itertools.islice(found, MOST_NAMES) if e.is_dir() or SUFFIX.search(e.name))
        stems = [SUFFIX.sub("", each).lower() for each in names]  # the suffix alone makes no likeness
        close = difflib.get_close_matches(SUFFIX.sub("", name).lower(), stems, 3)
        if meant := [os.path.join(folder, each) for stem, each in zip(stems, names, strict=True) if stem in close][:3]:
            fix = f"did you mean {', '.join(meant)}?"
        elif there := [os.path.join(folder, each) for each in names if SUFFIX.search(each)][:5]:
            fix = f"{fix}, where there is {', '.join(there)}"
    except (OSError, ValueError):
        if folder:
            fix = f"there is no folder {folder}; paths are taken from where you stand"
    text = f"there is no data file {path}"
    if any(c in path for c in "*?"):
        text, fix = f"no file matches {path}", "check the path; it is taken from where you stand"
    raise KitError(text, where, f"{fix} A Hub id: dataset.path={path}" if hub else fix, rule="data-word")


def preset_names(folders: Sequence[Path]) -> set[str]:
    """The names that `dataset=` takes from the kit's folder and from those of a user's own."""
    groups = [folder / "dataset" for folder in (paths.CONF, *folders)]
    return {str(f.relative_to(group).with_suffix("")) for group in groups for f in group.rglob("*.yaml")}


def data_overrides(words: list[str]) -> list[str]:
    """The overrides for the data files among the words of a command line: one, or a list of them."""
    for word in words:
        require_data(word)
    value = hydra_text(words[0]) if len(words) == 1 else f"[{','.join(map(hydra_text, words))}]"
    return ["dataset=none", f"++dataset.path={value}"]


def dataset_overrides(value: str, folders: Sequence[Path]) -> list[str] | None:
    """The overrides for `dataset=VALUE` where it is data, several to sweep over too; None where Hydra takes it."""
    presets = preset_names(folders)
    if value in ("", "null") or value in presets:
        return None
    if is_there(value):
        return data_overrides([value])
    if SWEEP.match(value):
        return None
    listed = value.startswith("[") and value.endswith("]") and not matches_files(value)
    parts = split_at_commas(value[1:-1] if listed else value)
    data = [part for part in parts if part not in presets and names_data(part)]
    if not data:
        return None
    if named := [part for part in parts if part in presets]:
        fix = f"two sweeps, or dataset={named[0]} with dataset.path={','.join(data)}"
        raise KitError(
            f"dataset= is given {named[0]}, a name, and {data[0]}, a file", "command line", fix, rule="data-word"
        )
    if listed or len(parts) == 1:
        return data_overrides(parts)
    for part in parts:
        require_data(part)
    return ["dataset=none", f"++dataset.path={','.join(map(hydra_text, parts))}"]


def split_at_commas(value: str) -> list[str]:
    """The parts of a list or a sweep, without the quotes that hold a comma in its place."""
    parts, place = [], 0
    while place <= len(value):
        quoted = QUOTED.match(value, place)
        if quoted and (quoted.end() == len(value) or value[quoted.end()] == ","):
            parts.append(re.sub(r"""\\(["'])""", r"\1", quoted[1][1:-1]))
            place = quoted.end() + 1
        else:
            end = value.find(",", place)
            end = len(value) if end < 0 else end
            parts.append(value[place:end].strip())
            place = end + 1
    return [part for part in parts if part]


def hydra_text(text: str) -> str:
    """Text as a value of Hydra's grammar that is this text, whatever stands in it."""
    if PLAIN.fullmatch(text):
        return text
    text = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", text)  # no interpolation
    text = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), text)
    return f'"{text}"'
