"""The books of an import: every key of the foreign files ends as carried, default-equal or not carried, once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from kit.foreign.tree import (
    KeyPath,
    dotted_key,
    is_secret_value,
    iterate_leaves,
    path_exists,
    secret_fix_for,
    value_at_path,
    value_on_one_line,
    without_paths,
)
from kit.schema import fields
from kit.system import paths

NOT_KNOWN = "not a key of"
BOOLEAN_WORDS = {"true": True, "yes": True, "y": True, "t": True, "false": False, "no": False, "n": False, "f": False}


@dataclass
class Entry:
    """What became of one source key."""

    source: str  # the file, or the command
    key: str
    outcome: Literal["carried", "default", "left"]
    to: list[str] = field(default_factory=list)  # kit keys, for "carried"
    note: str = ""  # for "left": the reason
    fix: str = ""
    value: str = ""


@dataclass
class Source:
    """One file or command line, read: its keys and where paths in it are looked for."""

    name: str
    format: str
    tree: dict[Any, Any]
    folder: Path = Path()
    typed: bool = False  # words of a command line, not of a file
    script: str = ""  # the script or module whose options these are, where it is none of TRL's


class Recipe:
    """The kit's own keys as they are collected; a later source's value stands where two speak of one key."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.groups: dict[str, str] = {}
        self.their_defaults: dict[str, str] = {}  # kit key: why it is written although no source says it
        self.notes: list[str] = []
        self.setter: dict[str, Entry] = {}

    def set(self, key: str, value: Any, entry: Entry) -> None:
        before = self.setter.get(key)
        if before is not None and before is not entry and before.outcome == "carried":
            if same_setting(key, self.values[key], value):
                if before.source != entry.source:
                    entry.note = entry.note or f"{before.source} says the same"
            else:
                mark_overruled(
                    before, key, f"{entry.source} says {value_on_one_line(value)} in {entry.key}, and that stands"
                )
        self.values[key] = value
        self.setter[key] = entry
        self.their_defaults.pop(key, None)

    def default(self, key: str, value: Any, reason: str) -> None:
        """A default of the foreign tool, written out where it differs from the kit's and no source gives the key."""
        if key not in self.values and not same_value(kit_default(key), value):
            self.values[key] = value
            self.their_defaults[key] = reason

    def drop(self, key: str, reason: str) -> None:
        """Take a key back that another one makes meaningless."""
        if key in self.values:
            del self.values[key]
            self.their_defaults.pop(key, None)
            if entry := self.setter.pop(key, None):
                mark_overruled(entry, key, reason)

    def nested(self) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for key, value in self.values.items():
            block, parts = tree, key.split(".")
            for part in parts[:-1]:
                block = block.setdefault(part, {})
            block[parts[-1]] = value
        if sets := (tree.get("dataset") or {}).get("mix"):  # dataset.mix.0.path, dataset.mix.1.path, ...
            tree["dataset"]["mix"] = [sets[number] for number in sorted(sets, key=int)]
        return tree


class Reading:
    """All sources of one format as one tree, with the entry of each key that has been dealt with."""

    def __init__(self, sources: list[Source], recipe: Recipe) -> None:
        self.format = sources[0].format
        self.recipe = recipe
        self.tree: dict[Any, Any] = {}
        self.sources: dict[Any, Source] = {}
        self.entries: dict[KeyPath, Entry] = {}
        self.hidden: set[KeyPath] = set()  # secrets and names of code: what is carried around them is carried without
        self.extra: list[Entry] = []  # keys that a later source of the same format gives again
        for source in sources:
            for name, value in source.tree.items():
                if name in self.tree:
                    old = Entry(self.sources[name].name, str(name), "left", note=f"given again in {source.name}")
                    self.extra.append(old)
                self.tree[name], self.sources[name] = value, source
        self.name = sources[-1].name
        self.script = next((s.script for s in sources if s.script), "")
        self.leaves = list(iterate_leaves(self.tree, self.name))
        for path, value in self.leaves:
            if is_secret_value(path, value):
                self.leave(path, "a secret is never copied", secret_fix_for(path))
            elif "_target_" in path:
                self.leave(path, "no config names code to run here", "remove it")
        self.hidden = set(self.entries)

    def has(self, *path: str | int) -> bool:
        """Whether a key is given and neither it, nor a block around it, nor a key inside it is dealt with yet."""
        if not path_exists(self.tree, path) or any(path[:n] in self.entries for n in range(1, len(path) + 1)):
            return False
        return not any(p[: len(path)] == path for p in self.entries if p not in self.hidden)

    def get(self, *path: str | int, default: Any = None) -> Any:
        """A value, without secrets and code names inside it, wherever it has been noted already."""
        if not path_exists(self.tree, path):
            return default
        value = value_at_path(self.tree, path)
        hidden = [p for p in self.hidden if len(p) > len(path) and p[: len(path)] == path]
        return without_paths(value, [p[len(path) :] for p in hidden]) if hidden else value

    def source(self, path: KeyPath) -> Source:
        return self.sources[path[0]] if path else next(iter(self.sources.values()))

    def carry(self, path: KeyPath, key: str, value: Any, note: str = "") -> None:
        """This source key sets that kit key; a second call for the same source key adds a kit key to its entry."""
        entry = self.entries.get(path)
        if entry is None:
            entry = self.add_entry(path, "carried", note)
        elif note and note not in entry.note:
            entry.note = f"{entry.note}; {note}" if entry.note else note
        entry.to.append(key)
        self.recipe.set(key, convert_to_field_type(key, value), entry)

    def choose_group(self, path: KeyPath, group: str, choice: str, note: str = "") -> None:
        """This source key chooses a group, as `quantization=nf4` does."""
        entry = self.entries.get(path) or self.add_entry(path, "carried", note)
        entry.to.append(f"{group}={choice}")
        self.recipe.groups[group] = choice

    def mark_default(self, path: KeyPath, reason: str = "the same here") -> None:
        self.add_entry(path, "default", reason)

    def leave(self, path: KeyPath, reason: str, fix: str = "") -> None:
        self.add_entry(path, "left", reason, fix)

    def add_entry(self, path: KeyPath, outcome: Any, note: str, fix: str = "") -> Entry:
        assert path_exists(self.tree, path), path
        assert path not in self.entries, path
        value = value_at_path(self.tree, path)
        secret = is_secret_value(path, value)
        text = "(a secret)" if secret else value_on_one_line(self.get(*path) if path else "")
        entry = Entry(self.source(path).name, dotted_key(path), outcome, [], note, fix, text)
        self.entries[path] = entry
        return entry

    def carry_all(self, names: dict[str, str], *prefix: str | int) -> None:
        """Keys that only have another name here."""
        for name, key in names.items():
            if self.has(*prefix, name) and not self.skip_null(*prefix, name):
                self.carry((*prefix, name), key, self.get(*prefix, name))

    def leave_all(self, names: dict[str, tuple[str, str]], *prefix: str | int) -> None:
        """Keys that are known and have no counterpart here; switched off, they need none."""
        for name, (reason, fix) in names.items():
            if self.has(*prefix, name):
                if self.get(*prefix, name) in (None, False, "", [], {}, 0):
                    self.mark_default((*prefix, name), "switched off, as here")
                else:
                    self.leave((*prefix, name), reason, fix)

    def mark_defaults(self, names: dict[str, str], *prefix: str | int) -> None:
        """Keys that need nothing here, whatever their value."""
        for name, reason in names.items():
            if self.has(*prefix, name):
                self.mark_default((*prefix, name), reason)

    def skip_null(self, *path: str | int) -> bool:
        """Null in a source is what a missing key is; notes it."""
        if self.has(*path) and self.get(*path) is None:
            self.mark_default(path, "null: nothing is set")
            return True
        return False

    def finish(self) -> list[Entry]:
        """What is left over is named as unknown; every entry, in the order of the sources."""
        for path, _ in self.leaves:
            if not any(path[:n] in self.entries for n in range(len(path) + 1)):
                reason = f"{NOT_KNOWN} {self.format} that is known here"
                self.leave(path, reason, "check its name, or set what it means by hand")
        order = {path: n for n, (path, _) in enumerate(self.leaves)}

        def place(path: KeyPath) -> int:
            return order.get(path, next((n for p, n in order.items() if p[: len(path)] == path), 0))

        return [*(self.entries[p] for p in sorted(self.entries, key=place)), *self.extra]


def mark_overruled(entry: Entry, key: str, reason: str) -> None:
    entry.to = [k for k in entry.to if k != key]
    if entry.to:
        entry.note = f"{entry.note}; " * bool(entry.note) + f"{key}: {reason}"
    else:
        entry.outcome, entry.note, entry.fix = "left", reason, ""


def same_value(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def same_setting(key: str, a: Any, b: Any) -> bool:
    if key == "deepspeed.file":
        return Path(str(a)).expanduser().resolve() == Path(str(b)).expanduser().resolve()
    return same_value(a, b)


FIELD_TABLES = {"trainer": "SFTConfig", "peft": "LORA", "quantization": "BitsAndBytesConfig"}


@cache
def read_group_file(name: str) -> dict[str, Any]:
    return yaml.safe_load((paths.CONF / name).read_text(encoding="utf-8")) or {}


def kit_default(key: str) -> Any:
    """What the kit does where a run says nothing: the default groups, else the library's own default."""
    section, _, name = key.partition(".")
    file = {"trainer": "trainer/sft.yaml", "peft": "peft/lora.yaml"}.get(section)
    if file and name in read_group_file(file):
        return read_group_file(file)[name]
    table = FIELD_TABLES.get(section)
    return fields.field_default(table, name) if table and name in fields.field_tables()[table] else None


def convert_to_field_type(key: str, value: Any) -> Any:
    """Words as the numbers and truth values that a field takes: the foreign parsers convert them too."""
    section, _, name = key.partition(".")
    entry = fields.field_tables().get(FIELD_TABLES.get(section, ""), {}).get(name)
    if entry is None or "str" in entry["kinds"]:
        return value
    if isinstance(value, str):
        if "bool" in entry["kinds"] and value.lower() in BOOLEAN_WORDS:
            return BOOLEAN_WORDS[value.lower()]
        try:
            number = float(value)
        except ValueError:
            return value
        return int(value) if re.fullmatch(r"[+-]?\d+", value) else number
    if type(value) is int and entry["kinds"] == ["bool"] and value in (0, 1):
        return bool(value)
    return value
