"""Command lines and configs of strangers, from public repositories, through `kit import`; the list is committed.

    python tests/strangers.py list FOLDER --out LIST.json                 # which there are
    python tests/strangers.py judge FOLDER LIST.json --half work|first    # what kit import makes of them
    python tests/strangers.py show FOLDER LIST.json N [--half ...]        # N of them at random, to be judged by hand

FOLDER holds one checkout a repository, named OWNER+NAME, with the commit's hash in a file `.commit`. The list holds
repository, path, line and SHA-256 of each text, not the texts. Repositories are halved by a hash of their name: one
half is for work, the other is counted first when the work is done.

A verdict is right: refused for a reason that an independent look at the text confirms, or imported with every key on
the books, values equal in the plan, and nothing that decides what is trained (method, adapter, quantization, data)
left behind at exit code 0. All else is wrong: a traceback, a key without a line, a value changed, another kind of run
taken for text SFT, a recipe that `kit check` refuses for what the importer wrote.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import shlex
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

MOST_OF_ONE = 16  # texts of one repository
ENTRY = re.compile(
    r"^(?:\$ |> )?(?:[A-Z][A-Z0-9_]*=(?:\"[^\"]*\"|'[^']*'|\S*) +)*"
    r"(?:(?:nohup|srun|time|env|uv run|poetry run) +(?:-\S+ +)*)*"
    r"(?:trl (?:sft|dpo|grpo|kto|reward|ppo|orpo)|llamafactory-cli train|axolotl train|accelerate launch"
    r"|deepspeed |torchrun |python[\d.]* -m (?:torch\.distributed|axolotl|accelerate|llamafactory)"
    r"|python[\d.]* (?:-\w+ +)?\S*(?:sft|tune|train|lora|run_clm|dpo|orpo)\S*\.py\b)"
)
STARTS_CODE = re.compile(r"\.py\b|\s(-m|--module)\s|\.ya?ml\b|^(\S+=\S* )*(trl|axolotl|llamafactory-cli) ")
FENCE = re.compile(r"^ *(```+|~~~+) *\{?\.?(\w*)")
SHELLS = ("", "bash", "sh", "shell", "console", "zsh", "cmd", "text")
TRAINING_KEYS = set(
    "learning_rate num_train_epochs num_epochs max_steps per_device_train_batch_size micro_batch_size lora_r "
    "lora_rank gradient_accumulation_steps base_model model_name_or_path output_dir warmup_ratio warmup_steps "
    "lr_scheduler_type lr_scheduler sequence_len cutoff_len max_seq_length bf16 fp16 optimizer optim weight_decay "
    "lora_alpha adapter train_file dataset dataset_name datasets epochs batch_size lr".split()
)


# ---------------------------------------------------------------------------------------------------------- the list


def texts_of(file: Path) -> Iterator[tuple[int, str, str]]:
    """(line, kind, text) of the command lines of one document or script, or of one config."""
    try:
        text = file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return
    if file.suffix in (".yaml", ".yml", ".json"):
        if is_training_config(text):
            yield 1, "config", text
        return
    variables: dict[str, str] = {}
    inside = script = file.suffix in (".sh", ".bash", ".slurm", ".sbatch")
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        line, first = lines[number], number + 1
        number += 1
        if not script and (fence := FENCE.match(line)):
            inside, variables = not inside and fence[2].lower() in SHELLS, {}
            continue
        if not inside:
            continue
        while line.rstrip().endswith("\\") and number < len(lines):
            line, number = line.rstrip()[:-1] + " " + lines[number].strip(), number + 1
        line = line.strip()
        if assigned := re.fullmatch(r"(?:export )?([A-Za-z_]\w*)=(\"[^\"]*\"|'[^']*'|[^\s;|&$(`]*)", line):
            variables[assigned[1]] = expand(assigned[2].strip("\"'"), variables)
        elif ENTRY.match(line) and STARTS_CODE.search(typed := as_typed(line, variables)):
            yield first, "command", typed


def expand(text: str, variables: dict[str, str]) -> str:
    """Put in what the lines above have set, as the shell does; what they have not set stays as it is."""
    return re.sub(r"\$\{?([A-Za-z_]\w*)\}?", lambda m: variables.get(m[1], m[0]), text)


def as_typed(line: str, variables: dict[str, str]) -> str:
    """One command as the shell would start it: without prompt, redirection, pipe, and what follows it."""
    line = re.sub(r"^(\$|>) ", "", expand(line, variables))
    line = re.split(r"\s(?:&&|\|\||;|\|)(?:\s|$)|\s[&\d]?>{1,2}|\s&\s*$|\s#\s|```", line, maxsplit=1)[0]
    return " ".join(line.split()).removesuffix(" &").removesuffix("&").strip()


def is_training_config(text: str) -> bool:
    if len(text) > 100_000:
        return False
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError):
        return False
    if not isinstance(tree, dict):
        return False
    if {"zero_optimization", "distributed_type"} & set(tree):
        return True
    keys = {str(k) for k in tree} | {str(k) for v in tree.values() if isinstance(v, dict) for k in v}
    return len(keys & TRAINING_KEYS) >= 3


def half_of(repository: str) -> str:
    return "work" if hashlib.sha256(repository.encode()).digest()[0] % 2 else "first"


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_list(folder: Path) -> dict[str, Any]:
    items, commits, seen = [], {}, set()
    for place in sorted(p for p in folder.iterdir() if p.is_dir()):
        repository, found = place.name.replace("+", "/", 1), []
        for file in sorted(place.rglob("*")):
            if file.is_file() and not file.is_symlink():
                for line, kind, text in texts_of(file):
                    if (sha := hash_of(text)) not in seen:
                        seen.add(sha)
                        path = str(file.relative_to(place))
                        found.append({"path": path, "line": line, "kind": kind, "sha256": sha})
        found = sorted(found, key=lambda item: item["sha256"])
        some = [[i for i in found if i["kind"] == kind] for kind in ("command", "config")]
        least = min(len(some[0]), len(some[1]), MOST_OF_ONE // 2)
        kept = some[0][: MOST_OF_ONE - least] + some[1][: MOST_OF_ONE - min(len(some[0]), MOST_OF_ONE - least)]
        if kept:
            with contextlib.suppress(OSError):
                commits[repository] = (place / ".commit").read_text().strip()
            items += [{"repository": repository, **i} for i in sorted(kept, key=lambda i: (i["path"], i["line"]))]
    return {"repositories": commits, "items": items}


def text_of(folder: Path, item: dict[str, Any]) -> str:
    file = folder / item["repository"].replace("/", "+", 1) / item["path"]
    return next(text for _, _, text in texts_of(file) if hash_of(text) == item["sha256"])


# ------------------------------------------------------------------------------------------------------------ judged

# Said by the text itself, without the importer's tables: another kind of run than the fine-tuning of a text model.
OTHER = re.compile(
    r"(?i)(?<![a-z])(dpo|orpo|kto|cpo|ppo|rloo|grpo|gkd|simpo|rlhf|ilql|reward|preference|chosen|rejected|vllm_mode|rl|rm"
    r"|vl|vlm|vit|vision|llava|internvl|images?|pixels|audio|video|speech|whisper|wav2vec2?|clip|diffusion|dreambooth"
    r"|bert|roberta|t5|bart|seq2seq|glue|squad|qa|classification|translation|summari[sz]ation|embedd?(er|ing)s?"
    r"|rerank(er)?|retriev(er|al)|imagenet|resnet|cifar|segment\w*|eval(uate|uation)?|inference|generate|merge|convert"
    r"|lm_eval|export|processor_type|num_generations|distill\w*|vision_\w+|smolvlm\d*|minicpmv|gemma-?3n|moe_router)(?![a-z])"
)
TOOL_WORDS = re.compile(
    r"swift/cli|tuner_type|rlhf_type|_component_|model_class|actor_rollout_ref|exp_manager|ulysses|data_stages|parallelism|\nmethod:"
)
CONTENT = {
    "model-folder",
    "tokenizer-files",
    "dataset-files",
    "missing",
    "deepspeed-file",
    "data-word",
    "type",
    "hub-dataset",
}  # of what the user wrote
SAME = {  # theirs, ours: numbers that must arrive as they are
    "learning_rate": "trainer.learning_rate", "lr": "trainer.learning_rate", "lora_alpha": "peft.lora_alpha",
    "lora_r": "peft.r", "lora_rank": "peft.r", "lora_dropout": "peft.lora_dropout", "seed": "trainer.seed",
    "weight_decay": "trainer.weight_decay", "num_train_epochs": "trainer.num_train_epochs",
    "gradient_accumulation_steps": "trainer.gradient_accumulation_steps", "max_steps": "trainer.max_steps",
    "per_device_train_batch_size": "trainer.per_device_train_batch_size", "max_length": "trainer.max_length",
    "max_seq_length": "trainer.max_length", "cutoff_len": "trainer.max_length", "sequence_len": "trainer.max_length",
    "micro_batch_size": "trainer.per_device_train_batch_size", "model_name_or_path": "model.name_or_path",
    "base_model": "model.name_or_path", "max_grad_norm": "trainer.max_grad_norm",
    "num_epochs": "trainer.num_train_epochs",
}  # fmt: skip
TRAINS_ADAPTER = re.compile(
    r"(?i)(use_peft\w*|use_lora|q_?lora|lora_enable|adapter)[ =:]+[\"']?(true|lora|qlora|--|$|1)"
)
FOUR_BITS = re.compile(
    r"(?i)(load_in_4bit|use_4bit\w*|q_lora)[ =:]+[\"']?(true|--|$|1)|(?<![a-z_])(bits|quantization_bit)[ =:]+4\b"
)


def place_of(folder: Path, item: dict[str, Any], text: str) -> Path:
    """Where one would stand: the folder nearest to the document in which the files that are named are."""
    root = folder / item["repository"].replace("/", "+", 1)
    if item["kind"] == "config":
        return root
    names = re.findall(r"[\w./-]+\.(?:ya?ml|json)\b", text)
    place = (root / item["path"]).parent
    while place != root and not all((place / name).is_file() for name in names):
        place = place.parent
    return place


def own_look(item: dict[str, Any], text: str) -> dict[str, Any]:
    """The options or leaves of a text, read without the importer."""
    if item["kind"] == "config":
        tree = yaml.safe_load(text)
        return {str(k): v for k, v in tree.items()}
    try:
        words = shlex.split(text.rstrip("\\ "))
    except ValueError:
        words = text.split()
    start = next((n for n, w in enumerate(words) if w.endswith(".py")), None)
    start = start or next((n for n, w in enumerate(words) if w.endswith((".yml", ".yaml"))), 0)
    found: dict[str, Any] = {}
    for n, word in enumerate(words[start:], start):
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            after = words[n + 1] if n + 1 < len(words) and not words[n + 1].startswith("--") else "true"
            found[name.replace("-", "_")] = yaml.safe_load(value) if equals and value[:1] not in "{[<$%@`" else (
                value if equals else after)  # fmt: skip
    return found


def named_in(item: dict[str, Any], look: dict[str, Any], text: str) -> str:
    """What says what kind of run it is: the names of script, module, model, method, and of keys of other methods."""
    said = [str(look[k]) for k in look if re.search(r"model|base|stage|^rl$|rlhf|task_type|processor", k)]
    said += [
        k for k in look if re.search(r"reward|beta$|image|video|vision|pixels|rlhf|num_generations|vllm|ref_model", k)
    ]
    if item["kind"] == "config":
        return " ".join([item["path"].rpartition("/")[2], *said, *re.findall(r"chosen|rejected|processor_type", text)])
    said += re.findall(r"(?:model_name_or_path|base_model): (\S+)", text)
    said += re.findall(r"processor_type|reward_funcs|chosen|rejected", text)
    script = (re.findall(r"(\S+)\.py\b", text) or re.findall(r"(?<=-m )\S+|(?<=trl )\w+", text))[:1]
    return " ".join([*script, *said]).replace("_", " ").replace("beta", "dpo")


def text_of_files(command: str) -> Iterator[str]:
    for name in re.findall(r"[\w./-]+\.ya?ml\b", command):
        if Path(name).is_file():
            yield "\n" + Path(name).read_text(encoding="utf-8", errors="replace")


def number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def judge(folder: Path, item: dict[str, Any]) -> dict[str, Any]:
    """What kit import makes of one text, and whether that is right as far as a program can tell; else "by hand"."""
    from kit.errors import KitError
    from kit.importing import import_config

    text = text_of(folder, item)
    os.chdir(place_of(folder, item, text))
    look = own_look(item, text)
    whole = text + "".join(text_of_files(text))  # the configs that it names too
    other = OTHER.search(named_in(item, look, whole))
    known = [k for k in look if k in TRAINING_KEYS]
    try:
        made = import_config(text if item["kind"] == "command" else item["path"])
    except KitError as error:
        said = error.problems[0].problem
        return {"outcome": "refused", "said": said[:150], **judge_refusal(said, other, look, known, whole)}
    except Exception as error:
        return {
            "outcome": "traceback",
            "said": repr(error)[:150],
            "verdict": "wrong",
            "why": traceback.format_exc()[-300:],
        }
    said = "; ".join(f"{p.problem} [{p.rule}]" for p in made.problems)[:300]
    outcome = "valid" if not made.problems else "refused by check"
    return {"outcome": outcome, "said": said, **judge_import(item, made, other, look, whole)}


def judge_refusal(said: str, other: Any, look: dict[str, Any], known: list[str], text: str) -> dict[str, str]:
    if re.search("no supervised|another trainer|images or sound|does not train|text alone|preferences", said):
        if other:
            return {"verdict": "right", "why": f"{other[0]} stands in it"}
    if re.search("stands for|there is no file|is not whole|dash of print", said):
        return {"verdict": "right", "why": "it has a gap, or names a file that is not there"}
    if re.search("no option of|no key of|another tool or a script's own|is a file of|neither a file|no config", said):
        if len(known) <= 3 or len(known) < len(look) / 3:
            return {"verdict": "right", "why": f"{len(known)} of {len(look)} words are known training words"}
    if "does not train" in said and re.search(r"(?i)do_train[\"= :]+false|do_predict[\"= :]+true|do_predict --", text):
        return {"verdict": "right", "why": "do_train, do_predict say so"}
    if "does not train" in said and not re.search(r"train|sft|tun", said.partition(" ")[0].rpartition("/")[2]):
        return {"verdict": "right", "why": "the script's name"}
    if "this is not a supervised fine-tuning run" in said and re.search(r"stage: (dpo|rm|ppo|kto)|rl: ", text):
        return {"verdict": "right", "why": "its stage"}
    if "beta belongs" in said and re.search(r"beta:|dpo", text):
        return {"verdict": "right", "why": "beta: of DPO"}
    if "the keys of" in said and TOOL_WORDS.search(text):
        return {"verdict": "right", "why": "another tool's own words"}
    if "names no file and no option" in said and not look:
        return {"verdict": "right", "why": "it has none"}
    if "not valid YAML" in said or "given twice" in said:
        return {"verdict": "right", "why": "broken"}
    return {"verdict": "by hand"}


def judge_import(item: dict[str, Any], made: Any, other: Any, look: dict[str, Any], text: str) -> dict[str, str]:
    run = any(form in ("trl", "axolotl", "llamafactory") for _, form in made.detected)
    books = {re.split(r"[.\[]", e.key)[0] for e in made.entries} | {"config", "deepspeed_config"}
    deepspeed = any(form == "deepspeed" for _, form in made.detected)
    if not deepspeed and (lost := [k for k in look if k not in books and not (item["kind"] == "config" and not run)]):
        return {"verdict": "wrong", "why": f"no line for {', '.join(lost[:5])}"}
    if not run:
        return {"verdict": "right", "why": "every key has a line"}
    tree = yaml.safe_load(made.text) or {}
    for name, key in SAME.items():
        if name in look and look[name] not in (None, "auto", "true", {}) and not isinstance(look[name], dict | list):
            section, _, field = key.partition(".")
            got = (tree.get(section) or {}).get(field)
            left = any(e.key == name and e.outcome != "carried" for e in made.entries)
            if not left and number(got) != number(look[name]) and not (got is None and str(look[name]) == "-1"):
                return {"verdict": "by hand", "why": f"{name} is {look[name]}, {key} is {got}"}
    if other:
        return {"verdict": "by hand", "why": f"{other[0]} stands in it"}
    groups = {k: v for d in tree.get("defaults", []) for k, v in d.items()}
    if not made.problems and groups.get("override /peft") == "none" and TRAINS_ADAPTER.search(text):
        return {"verdict": "wrong", "why": "an adapter is asked for and every weight would be trained"}
    if not made.problems and FOUR_BITS.search(text) and groups.get("override /quantization") != "nf4":
        return {"verdict": "wrong", "why": "4 bits are asked for and not carried"}
    decisive = "may decide what is trained"
    theirs = [
        p
        for p in made.problems
        if p.rule not in CONTENT and decisive not in p.problem and not p.where.startswith("deepspeed")
    ]
    if theirs:
        return {"verdict": "by hand", "why": f"check: {theirs[0].problem[:120]} [{theirs[0].rule}]"}
    return {"verdict": "right", "why": "every key has a line, values are equal, what is missing is named"}


def judge_typed(folder: Path, item: dict[str, Any]) -> dict[str, Any]:
    """What kit check says of the same options typed behind it: each is named, the common ones with their key here."""
    from kit.cli.verbs import run_verb

    text = text_of(folder, item)
    os.chdir(place_of(folder, item, text))
    try:
        words = shlex.split(text.rstrip("\\ "))
    except ValueError:
        return {}
    start = next((n for n, w in enumerate(words) if w.endswith(".py")), None)
    start = start or next((n for n, w in enumerate(words) if w in ("sft", "train")), None)
    options = words[(start or 0) + 1 :]
    if start is None or "axolotl" in text or not any(w.startswith("--") for w in options):
        return {}
    out = io.StringIO()
    try:
        with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
            code = run_verb(["check", *options])
    except SystemExit:
        return {}  # --help
    except Exception as error:
        return {"typed": "traceback", "typed_why": repr(error)[:150] + traceback.format_exc()[-200:]}
    said, look = out.getvalue(), own_look(item, text)
    missing = [k for k in look if not re.search(rf"(?<![a-z]){re.escape(k)}(?![a-z_])", said.replace("-", "_"))]
    wrong = [k for k in look if k in SAME and SAME[k] not in said]
    if code == 0 or missing or wrong:
        return {"typed": "wrong", "typed_why": f"exit {code}; not named: {missing[:5]}; another key: {wrong[:5]}"}
    return {"typed": "right"}


def judge_half(folder: Path, items: list[dict[str, Any]], half: str) -> list[dict[str, Any]]:
    here = Path.cwd()
    try:
        some = [i for i in items if half_of(i["repository"]) == half]
        return [{**i, **judge(folder, i), **(judge_typed(folder, i) if i["kind"] == "command" else {})} for i in some]
    finally:
        os.chdir(here)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["list", "judge", "show"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("list", type=Path, nargs="?")
    parser.add_argument("number", type=int, nargs="?", default=10)
    parser.add_argument("--half", default="work")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.verb == "list":
        made = make_list(args.folder)
        args.out.write_text(json.dumps(made, indent=0) + "\n")
        print(
            len(made["repositories"]),
            len(made["items"]),
            Counter(i["kind"] for i in made["items"]),
            Counter(half_of(i["repository"]) for i in made["items"]),
        )
        return
    folder, listed = args.folder.resolve(), json.loads(args.list.read_text())
    if args.verb == "judge":
        judged = judge_half(folder, listed["items"], args.half)
        print(json.dumps(Counter(f"{i['outcome']}: {i['verdict']}" for i in judged), indent=1))
        print(json.dumps(Counter(i["typed"] for i in judged if "typed" in i)))
        args.out.write_text(json.dumps(judged, indent=0, ensure_ascii=False) + "\n")
    else:
        items = [i for i in listed["items"] if half_of(i["repository"]) == args.half]
        for item in random.Random(args.half).sample(items, args.number):
            print(item["repository"], item["path"], item["line"], item["sha256"][:12])
            print("   ", text_of(folder, item)[:1500], "\n")


if __name__ == "__main__":
    main()
