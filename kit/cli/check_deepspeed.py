"""`kit check --deepspeed FILE`: somebody's DeepSpeed JSON by itself, explained and mended; imports no torch."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kit.config.deepspeed.against_run import add_mismatches, describe_autos, fill_for_run, read_run_settings
from kit.config.deepspeed.check import parse_deepspeed_json, read_deepspeed_text
from kit.config.deepspeed.findings import REFUSE, FileFinding, find_faults, to_problem
from kit.config.deepspeed.fixes import apply_fixes
from kit.config.flags import parse_words
from kit.errors import DONE, REFUSED, KitError, Problem
from kit.storage.json_files import atomic_write_text
from kit.system.terminal import print_problems


def check_deepspeed(argv: list[str]) -> int:
    """The exit code: 2 where something is wrong (after --fix: where something is left that it could not mend)."""
    parser = argparse.ArgumentParser(
        prog="kit check", allow_abbrev=False, description="A DeepSpeed JSON by itself: what is wrong in it, and what "
        'each "auto" becomes for a model or a run, where one is named.',
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="run.yaml | key=value", help="a model=NAME, or a whole run")
    parser.add_argument("--deepspeed", required=True, metavar="FILE", help="the DeepSpeed JSON")
    parser.add_argument("--model", metavar="DIR | HUB_ID", help='the model for which "auto" is worked out')
    parser.add_argument("--config-dir", "-cd", help="a folder with groups and recipes of your own")
    parser.add_argument(
        "--fix", nargs="?", const="", metavar="OUT", help="write a mended file (FILE with .fixed.json)"
    )
    parser.add_argument("--overwrite", action="store_true", help="OUT may be there already")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    try:
        a = parse_words(parser, argv)
    except KitError as error:  # another tool's command line, whose --deepspeed is the JSON of its run
        words = [w for word in argv for w in word.split("=", 1)]
        file = words[words.index("--deepspeed") + 1 :][:1] or ["FILE.json"]
        text, fix = "--deepspeed of kit check reads a JSON by itself", f"for a run: deepspeed.file={file[0]}"
        raise KitError([*error.problems, Problem(text, "command line", fix, "override")]) from None
    if a.fix and "=" in a.fix and not a.fix.endswith(".json"):
        a.overrides, a.fix = [*a.overrides, a.fix], ""  # `--fix recipe=...`
    try:
        answer = examine_file(a.deepspeed, a.overrides, a.model, a.config_dir, a.fix, a.overwrite)
    except KitError as error:
        if not a.json:
            raise
        print(json.dumps({"valid": False, "problems": error.to_json()}, indent=1))
        return error.code
    if a.json:
        shown = {k: [finding_row(f) for f in v] if k in ("problems", "remaining") else v for k, v in answer.items()}
        print(json.dumps(shown, indent=1, ensure_ascii=False))
    else:
        print_answer(answer, a.fix is not None)
    left = answer["remaining"] if a.fix is not None else answer["problems"]
    return REFUSED if any(f.severity == REFUSE for f in left) else DONE


def examine_file(
    file: str, overrides: list[str], model: str | None, config_dir: str | None, fix: str | None, overwrite: bool
) -> dict[str, Any]:
    """Findings, autos and, where `fix` is not None, the changes; the mended file is written."""
    text = read_deepspeed_text(file)
    tree = parse_deepspeed_json(text, file, twice=True)
    setting = read_run_settings(overrides, model, config_dir)
    out, disagreements = fill_for_run(tree, setting)
    findings = add_mismatches(find_faults(text, file), tree, text, setting, disagreements)
    answer: dict[str, Any] = {
        "file": file,
        "valid": not any(f.severity == REFUSE for f in findings),
        "problems": findings,
    }
    answer["auto"] = describe_autos(tree, text, setting, out, disagreements)
    answer["notes"] = setting.notes
    if fix is not None:
        mended, changes = apply_fixes(text, find_faults)
        tree = parse_deepspeed_json(mended, file, twice=True)
        left = add_mismatches(find_faults(mended, file), tree, mended, setting, fill_for_run(tree, setting)[1])
        answer |= {"changes": [vars(c) for c in changes], "remaining": left, "written": None}
        if changes:
            answer["written"] = write_mended(fix or str(Path(file).with_suffix(".fixed.json")), mended, overwrite)
    return answer


def write_mended(out: str, text: str, overwrite: bool) -> str:
    """The mended file, whole or not at all; KitError where a file of that name is there."""
    path = Path(out).expanduser()
    if path.exists() and not overwrite:
        raise KitError(f"{out} is there already", "--fix", "--fix OTHER.json, or --overwrite")
    atomic_write_text(path, text)
    return out


def finding_row(finding: FileFinding) -> dict[str, Any]:
    return {
        "rule": finding.rule, "severity": finding.severity, "key": finding.key, "line": finding.line,
        "problem": finding.problem, "fix": finding.fix, "mendable": bool(finding.edits),
    }  # fmt: skip


def print_answer(answer: dict[str, Any], fixing: bool) -> None:
    """The answer in words: autos and changes on standard output, problems on standard error."""
    file = answer["file"]
    for r in answer["auto"]:
        becomes = r["from"] if r["becomes"] is None else f"{json.dumps(r['becomes'])}  ({r['from']})"
        print(f"{file}:{r['line']}: {r['key']}: auto -> {becomes}")
    for note in answer["notes"]:
        print(f"note       {note}")
    findings = answer["remaining"] if fixing else answer["problems"]
    if fixing:
        for c in answer["changes"]:
            print(f"{file}:{c['line']}: {c['did']}\n  why:   {c['why']}")
            if c["keep"]:
                print(f"  then:  give the trainer {c['keep']}")
        print(f"written    {answer['written']}" if answer["written"] else "nothing to mend")
        if findings:
            print(f"left       {len(findings)}: what follows has no single answer")
    sys.stdout.flush()
    wrong = [f for f in findings if f.severity == REFUSE]
    print_problems([to_problem(f, file) for f in wrong], refused=True)
    if wrong and len(wrong) < len(findings):
        print(file=sys.stderr)
    print_problems([to_problem(f, file) for f in findings if f.severity != REFUSE], refused=False)
    if not wrong and not fixing:
        print("valid")
    mendable = sum(bool(f.edits) for f in findings)
    if mendable and not fixing:
        print(f"\n--fix mends {mendable} of {len(findings)}")
