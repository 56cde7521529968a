"""`kit import`: its words and what it prints."""

from __future__ import annotations

import json
import sys
from typing import Any

from kit.errors import DONE, REFUSED, KitError
from kit.foreign.translate import FORMAT_NAMES
from kit.importing import Imported, import_config, save_recipe
from kit.system.terminal import print_problems

USAGE = """\
usage: kit import FILE... | COMMAND ... [--out RECIPE.yaml] [--from FORMAT]

Other tools' configs as a recipe of the kit, with a list of what could not be carried over. FILE is a TRL or
transformers argument file, an accelerate config, a DeepSpeed JSON, an Axolotl or a LLaMA-Factory YAML; several that
belong together may be given. COMMAND is what starts the training: `trl sft ...`, `accelerate launch ...`,
`llamafactory-cli train ...` or `axolotl train ...`.

  --out FILE      where the recipe goes; without it, it is printed and the report goes to standard error
  --overwrite     replace FILE
  --from FORMAT   trl | accelerate | axolotl | llamafactory, where the keys do not say it
  --json          recipe and report as JSON
  --all           also list what was carried and what needs nothing

Exit codes: 0 the recipe is valid, 2 it is written but kit check refuses it, or nothing could be imported.
"""


def import_verb(argv: list[str]) -> int:
    """The verb. Its own options are taken out; all other words are the files, or the foreign command as it is."""
    words, flags, values = [], set(), {}
    place = 0
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return DONE if argv else REFUSED
    while place < len(argv):
        word = argv[place]
        name, equals, value = word.partition("=")
        if name in ("--out", "--from"):
            if not equals:
                place += 1
                if place >= len(argv):
                    raise KitError(f"{name} needs a value", "command line", "kit import --help")
                value = argv[place]
            values[name] = value
        elif word in ("--overwrite", "--json", "--all"):
            flags.add(word)
        else:
            words.append(word)
        place += 1
    form = values.get("--from")
    if form is not None and form not in FORMAT_NAMES:
        raise KitError(f"there is no format {form!r}", "--from", " | ".join(FORMAT_NAMES))
    imported = import_config(*words, form=form)
    out = values.get("--out")
    if out:
        save_recipe(imported, out, "--overwrite" in flags)
    if "--json" in flags:
        print(json.dumps(imported.to_json(), indent=1, ensure_ascii=False, default=str))
    else:
        if not out:
            print(imported.text, end="")
        print_report(imported, out, "--all" in flags, sys.stdout if out else sys.stderr)
    return REFUSED if imported.problems else DONE


def print_report(imported: Imported, out: str | None, everything: bool, to: Any) -> None:
    for source, form in imported.detected:
        print(f"{source}: {form}", file=to)
    kinds = {kind: [e for e in imported.entries if e.outcome == kind] for kind in ("carried", "default", "left")}
    print(f"{len(kinds['carried'])} keys carried over, {len(kinds['default'])} need nothing here, "
          f"{len(kinds['left'])} not carried over", file=to)  # fmt: skip
    if everything:
        for e in kinds["carried"]:
            print(f"  {e.key} = {e.value} -> {', '.join(e.to)}{format_note(e.note)}", file=to)
        for e in kinds["default"]:
            print(f"  {e.key} = {e.value}: {e.note}", file=to)
    else:
        for e in [e for e in kinds["carried"] if e.note]:
            print(f"  {e.key} -> {', '.join(e.to)}{format_note(e.note)}", file=to)
    if imported.their_defaults:
        print("their defaults, written out because the kit's differ:", file=to)
        for key, reason in imported.their_defaults.items():
            print(f"  {key}: {reason}", file=to)
    if kinds["left"]:
        print("not carried over:", file=to)
        for e in kinds["left"]:
            print(f"  {e.key} = {e.value}\n    {e.note}" + (f"\n    do: {e.fix}" if e.fix else ""), file=to)
    for text in imported.notes:
        print(f"note: {text}", file=to)
    if out:
        print(f"wrote {out}: kit train {out}", file=to)
    if imported.problems:
        print(f"\nkit check refuses it as it is ({len(imported.problems)}):\n", file=to, flush=True)
        print_problems(imported.problems, refused=False)


def format_note(text: str) -> str:
    return f"  ({text})" if text else ""
