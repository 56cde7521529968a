"""`kit import`: other tools' configs and command lines as a recipe, with what could not be carried over."""

from __future__ import annotations

import re
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kit.errors import KitError, Problem
from kit.foreign.read import READ_HERE, SUFFIXES, detect_format, read_config_file
from kit.foreign.report import NOT_KNOWN, Entry, Reading, Recipe, Source
from kit.foreign.translate import READERS, RUN_FORMATS
from kit.foreign.tree import value_on_one_line
from kit.importing.command import read_command, refuse_unset
from kit.storage.json_files import atomic_write_text

READ_ORDER = (
    *(name for name in READERS if name not in RUN_FORMATS),
    "deepspeed",
    *RUN_FORMATS,
)  # the run's own words stand last


DECISIVE = re.compile(
    r"lora|adapter|peft|quant|\b\w*bits?\b|freeze|unfreeze|prefix_tuning|p_tuning|distill|teacher|reward", re.I
)
ADAPTER = re.compile(r"\b(q|qa|hqq_|ada)?(lora|dora)\b", re.I)
NAMES_ONLY = re.compile(r"name|dir|path|folder|file|project|tag|output|group$", re.I)
OFF = ("null", "false", "0", "none", "no", "[]", "{}", "")
MOST_UNKNOWN = 3  # keys that no tool knows stand in many files


@dataclass
class Imported:
    """A recipe as text, and what became of every source key."""

    text: str
    tree: dict[str, Any]
    entries: list[Entry]
    detected: list[tuple[str, str]]  # (source, format)
    their_defaults: dict[str, str]
    notes: list[str]
    problems: list[Problem] = field(default_factory=list)  # what kit check says of the recipe

    def to_json(self) -> dict[str, Any]:
        return {
            "detected": [{"source": s, "format": f} for s, f in self.detected],
            "recipe": self.text,
            "keys": [asdict(e) for e in self.entries],
            "their_defaults": self.their_defaults,
            "notes": self.notes,
            "problems": [asdict(p) for p in self.problems],
        }


def import_config(*words: str, form: str | None = None, check: bool = True) -> Imported:
    """The recipe of config files or of one command line; KitError where they are no description of an SFT run."""
    sources = read_sources(list(words), form)
    given = {s.format for s in sources} & set(RUN_FORMATS)
    if len(given) > 1:
        named = ", ".join(f"{s.name} ({s.format})" for s in sources if s.format in given)
        raise KitError(f"these describe two runs: {named}", "command line", "import them one by one")
    recipe, entries = Recipe(), []
    for name in READ_ORDER:
        if not (same := [s for s in sources if s.format == name]):
            continue
        reading = Reading(same, recipe)
        if name == "deepspeed":
            for source in same:
                entries.append(carry_deepspeed_file(source, recipe))
            continue
        READERS[name](reading)
        entries += reading.finish()
    refuse_unset(entries, sources)
    refuse_strangers(entries, sources)
    reconcile_sources(recipe)
    tree = recipe_tree(recipe)
    text = recipe_text(tree, recipe, entries, sources)
    imported = Imported(
        text, tree, entries, [(s.name, s.format) for s in sources], recipe.their_defaults, recipe.notes
    )
    if not given:
        recipe.notes.append(
            "no model and no data are named here: add model=... and dataset=..., or the tool's own file"
        )
    imported.problems = decisive_losses(entries)
    if check:
        imported.problems += check_recipe(imported.text, recipe, bool(given))
    return imported


def refuse_strangers(entries: list[Entry], sources: list[Source]) -> None:
    """Refuse a run of which most keys are nobody's here: what little is known says nothing of it."""
    runs = {s.name: s.format for s in sources if s.format in RUN_FORMATS}
    own = [e for e in entries if e.source in runs and not e.note.startswith("given again")]
    unknown = [e.key for e in own if e.note.startswith(NOT_KNOWN)]
    if len(unknown) > MOST_UNKNOWN and len(unknown) > len(own) / 2:
        listed = ", ".join(unknown[:8]) + ", ..." * (len(unknown) > 8)
        raise KitError(
            f"{len(unknown)} of {len(own)} keys are of another tool or a script's own: {listed}",
            own[-1].source,
            f"kit import reads {READ_HERE}; name what the run needs in a recipe: kit show recipe=quickstart",
        )


def decisive_losses(entries: list[Entry]) -> list[Problem]:
    """Name the unknown keys that seem to decide what is trained: exit code 0 is not for a run without them."""
    return [
        Problem(f"{e.key} = {e.value} is not carried, and it may decide what is trained", e.source, e.fix)
        for e in entries
        if e.note.startswith(NOT_KNOWN)
        and e.value not in OFF
        and not NAMES_ONLY.search(e.key)
        and (DECISIVE.search(e.key) or ADAPTER.search(e.value))
    ]


def names_config_file(word: str) -> bool:
    """Whether a word is a file, and not a whole command line that ends in one."""
    if re.search(r"\s", word) and not is_there(word):
        return False
    plain = not re.search(r"[\s=]", word) and is_there(word) and Path(word).is_file() and "." in word
    return word.endswith(SUFFIXES) or (plain and not word.endswith((".py", ".sh")))


def is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a command line in one word is too long for a name
        return False


def read_sources(words: list[str], form: str | None) -> list[Source]:
    if not words:
        raise KitError("nothing is given", "command line", "kit import FILE.yaml, or kit import COMMAND ...")
    files = all(names_config_file(w) for w in words)
    if not files and len(words) == 1 and (words[0].startswith(("/", "./", "~")) or is_there(words[0])):
        files = not words[0].endswith(".py")
    if files:
        sources = []
        for word in words:
            path = Path(word).expanduser()
            tree = read_config_file(path)
            try:
                detected = detect_format(tree)
            except KitError as error:
                raise KitError(error.problems[0].problem, word, error.problems[0].fix) from None
            if detected is None and form is None:
                raise KitError(
                    f"{word} has no key of TRL, accelerate, Axolotl or LLaMA-Factory",
                    word,
                    "check the file, or say whose it is: --from trl|accelerate|axolotl|llamafactory",
                )
            chosen = form if form and detected not in ("accelerate", "deepspeed") else detected
            chosen = form if form and len(words) == 1 else chosen
            sources.append(Source(word, str(chosen), tree, path.parent))
    else:
        sources = read_command(words)
        if form:
            for source in sources:
                source.format = form if source.format in RUN_FORMATS else source.format
    return follow_trl_config(sources)


def follow_trl_config(sources: list[Source]) -> list[Source]:
    """A TRL file may name another one by `config`."""
    for source in list(sources):
        name = source.tree.get("config") if source.format == "trl" else None
        if isinstance(name, str) and name.endswith(SUFFIXES):
            place = next((p for p in (Path(name), source.folder / name) if p.is_file()), Path(name))
            del source.tree["config"]
            sources.insert(0, Source(str(place), "trl", read_config_file(place), place.parent))
    return sources


def carry_deepspeed_file(source: Source, recipe: Recipe) -> Entry:
    """A DeepSpeed JSON is used as it is."""
    entry = Entry(source.name, "(the whole file)", "carried", ["deepspeed.file"], "kit check reads it too")
    recipe.set("deepspeed.file", source.name, entry)
    return entry


def reconcile_sources(recipe: Recipe) -> None:
    """What only shows when all sources are together."""
    if "deepspeed.file" in recipe.values or "deepspeed" in recipe.values:
        for key in [k for k in recipe.values if k.startswith("deepspeed.") and k != "deepspeed.file"]:
            recipe.drop(key, f"{value_on_one_line(recipe.values.get('deepspeed.file', 'the JSON of the run'))} stands")
    if recipe.groups.get("peft") == "none":
        for key in [k for k in recipe.values if k.startswith("peft.")]:
            recipe.drop(key, "no adapter is trained")
    if not recipe.groups.get("quantization"):
        for key in [k for k in recipe.values if k.startswith("quantization.")]:
            recipe.drop(key, "the base is not quantized")


def recipe_tree(recipe: Recipe) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    groups = {k: v for k, v in recipe.groups.items() if (k, v) != ("peft", "lora")}
    if groups:
        tree["defaults"] = [{f"override /{name}": choice} for name, choice in sorted(groups.items())]
    order = "model tokenizer dataset peft quantization deepspeed fsdp trainer launch".split()
    nested = recipe.nested()
    for section in sorted(nested, key=lambda s: (order.index(s) if s in order else 99, s)):
        tree[section] = escape_interpolation(nested[section])
    return tree


def escape_interpolation(value: Any) -> Any:
    """Foreign text is text: what OmegaConf would look up in it is escaped, keys are words."""
    if isinstance(value, dict):
        return {str(k): escape_interpolation(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [escape_interpolation(v) for v in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value)
    return value if value is None or isinstance(value, bool | int | float) else str(value)


class RecipeDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def represent_text(dumper: RecipeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


RecipeDumper.add_representer(str, represent_text)


def recipe_text(tree: dict[str, Any], recipe: Recipe, entries: list[Entry], sources: list[Source]) -> str:
    """The recipe as YAML; its head says where it is from, its end what could not be carried over."""
    lines = ["# @package _global_"]
    lines += [f"# Imported from {comment_text(s.name)} ({s.format}) by kit import." for s in sources]
    body = yaml.dump(tree, Dumper=RecipeDumper, sort_keys=False, width=110, allow_unicode=True) if tree else ""
    left = [e for e in entries if e.outcome == "left"]
    ends = []
    if recipe.their_defaults:
        ends += ["", "# Their defaults, written out because the kit's differ:"]
        ends += [f"#   {comment_text(key)}: {comment_text(reason)}" for key, reason in recipe.their_defaults.items()]
    if left:
        ends += ["", "# Not carried over:"]
        ends += [
            f"#   {comment_text(e.key)}: {comment_text(e.note)}{'; ' * bool(e.fix)}{comment_text(e.fix)}" for e in left
        ]
    ends += [f"# Note: {comment_text(n)}" for n in recipe.notes]
    return "\n".join([*lines, body.rstrip("\n"), *ends]).rstrip() + "\n"


def comment_text(text: str) -> str:
    return printable_line(text)[:300]


def printable_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def check_recipe(text: str, recipe: Recipe, whole: bool) -> list[Problem]:
    """What `kit check` says of the recipe, meant for a machine with GPUs unless it says otherwise.

    `whole`: a run was described; an accelerate config alone names no model and no data, and is checked with others'.
    """
    from kit import api

    more = [] if "trainer.use_cpu" in recipe.values else ["trainer.use_cpu=false"]
    if not whole:
        more += ["model=llama3_1_8b", "dataset=alpaca_chat"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "imported.yaml"
        file.write_text(text, encoding="utf-8")
        problems = api.check(str(file), *more)
    return [Problem(p.problem, p.where.replace(str(file), "the recipe"), p.fix, p.rule) for p in problems]


def save_recipe(imported: Imported, out: str, overwrite: bool = False) -> None:
    """Write the recipe; KitError where the place will not do."""
    path = Path(out).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        raise KitError(f"{out} is no name for a recipe", "--out", "--out NAME.yaml")
    if path.exists() and not overwrite:
        raise KitError(f"{out} is there already", "--out", "another name, or --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, imported.text)
    except OSError as error:
        raise KitError(f"{out} cannot be written: {error.strerror or error}", "--out", "another place") from None
