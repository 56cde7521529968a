"""A command line that starts a training: its launcher, the files that it names, and its own options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from kit.errors import KitError, Problem
from kit.foreign import other_runs
from kit.foreign.read import SUFFIXES, detect_format, is_option, parse_scalar, read_config_file
from kit.foreign.report import Entry, Source
from kit.foreign.scripts import NAMES


def parse_options(words: list[str], flags: frozenset[str] = frozenset()) -> tuple[dict[str, Any], list[str]]:
    """`--key value`, `--key=value`, `--flag`, `--list a b`, and the words before the first option."""
    given: dict[str, Any] = {}
    plain: list[str] = []
    place = 0
    while place < len(words) and not is_option(words[place]):
        plain.append(words[place])
        place += 1
    while place < len(words):
        name, equals, value = words[place].lstrip("-").partition("=")
        name = name.replace("-", "_")
        place += 1
        values = [value] if equals else []
        while not equals and name not in flags and place < len(words) and not is_option(words[place]):
            values.append(words[place])
            place += 1
        given[name] = (
            [parse_scalar(v) for v in values] if len(values) > 1 else parse_scalar(values[0]) if values else True
        )
    return given, plain


LAUNCH_FLAGS = frozenset(
    "multi_gpu use_deepspeed use_fsdp use_megatron_lm use_parallelism_config cpu tpu use_cpu m module no_python debug "
    "quiet same_network downcast_bf16 enable_cpu_affinity tee standalone no_local_rank no_ssh force_multi "
    "no_ssh_check enable_each_rank_log save_pid".split()
)
LAUNCHERS = {"torchrun": "torchrun", "torch.distributed.run": "torchrun", "torch.distributed.launch": "torchrun",
             "deepspeed": "deepspeed"}  # fmt: skip
DEEPSPEED = frozenset(
    "deepspeed_config_file zero_stage offload_optimizer_device offload_param_device offload_optimizer_nvme_path "
    "offload_param_nvme_path zero3_init_flag zero3_save_16bit_model deepspeed_hostfile deepspeed_exclusion_filter "
    "deepspeed_inclusion_filter deepspeed_multinode_launcher deepspeed_moe_layer_cls_names gradient_clipping "
    "gradient_accumulation_steps".split()
)


TRL_SCRIPTS = ("sft.py", "run_sft.py", "trl.scripts.sft", "trl.commands.cli")
LLAMAFACTORY_SCRIPTS = ("train_bash.py", "train_sft.py", "llamafactory.cli", "llamafactory.launcher")
IN_FRONT = ("env", "nohup", "time", "srun", "exec", "sudo", "numactl")
SHELL = re.compile(
    r"\$[A-Za-z_{(@*\d]|`|<[\w$ ./:-]+>|\{[A-Za-z_]\w*\}"
)  # what a shell or a person would have filled in
PRINT_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2212"


def split_command(text: str) -> list[str]:
    """The words of a command line that stands in one, over several lines or not."""
    text = re.sub(r"\\[ \t]*(\r?\n|$)", " ", text.strip()).rstrip("\\ ")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise KitError(f"the command cannot be split into words: {error}", "command line", "quote it") from None


def refuse_words(words: list[str]) -> None:
    """Refuse what printing and shortening have made of a command."""
    for word in words:
        if word.startswith(tuple(PRINT_DASHES)):
            plain = "--" + word.lstrip(PRINT_DASHES + "-")
            raise KitError(f"{word!r} begins with a dash of print, not with --", "command line", f"type {plain}")
        if re.fullmatch(r"\{[A-Za-z]\w*", word):  # {number of gpus}
            raise KitError(f"{word} ... stands for a value", "command line", "put the value in")
        if word in ("...", "\u2026", "[...]"):
            raise KitError(f"the command is not whole: {word}", "command line", "the command as it is run")


def refuse_unset(entries: list[Entry], sources: list[Source]) -> None:
    """Refuse options that hold a variable of the shell, or a place to fill in, in place of a value."""
    typed = {s.name for s in sources if s.typed}
    unset = [e for e in entries if e.source in typed and e.outcome == "carried" and SHELL.search(e.value)]
    unset = [e for e in unset if not all(key.startswith("tokenizer.") for key in e.to)]  # <pad>
    if unset:
        fix = "put its value in, or give the command without quotes around it, so that your shell does"
        raise KitError([Problem(f"{e.key} is {e.value}, which stands for a value", e.source, fix) for e in unset])


def read_command(words: list[str]) -> list[Source]:
    """The sources behind a command line: its launcher, the files that it names, and its own options."""
    source_name = "the command"
    sources: list[Source] = []
    environment: dict[str, Any] = {}
    if len(words) == 1 and re.search(r"\s", words[0]):
        words = split_command(words[0])
    refuse_words(words)
    format_ = script = ""
    module = False  # whether the next word names a module
    while words:
        name = Path(words[0]).name
        if re.match(r"[A-Za-z_]\w*=", words[0]) and not format_:
            key, _, value = words[0].partition("=")
            environment[key] = value
            words = words[1:]
        elif re.fullmatch(r"python[\d.]*", name):
            words = words[1:]
            while words and words[0] in ("-u", "-m"):
                module, words = words[0] == "-m", words[1:]
        elif name in ("uv", "poetry", "pipenv") and words[1:2] == ["run"]:
            words = words[2:]
        elif name in IN_FRONT:
            words = words[1:]
            while words and is_option(words[0]):
                words = words[1:] if "=" in words[0] or not words[0].startswith("--") else words[2:]
        elif name == "accelerate" and words[1:2] == ["launch"] or name == "accelerate.commands.launch":
            given, words = parse_launcher_options(words[2:] if name == "accelerate" else words[1:])
            module = bool({given.pop("m", None), given.pop("module", None)} - {None})
            if file := given.pop("config_file", None):
                sources.append(read_source(str(file), "accelerate"))
            if given:
                tree = options_as_accelerate_config(given)
                sources.append(Source("accelerate launch", "accelerate", tree, typed=True))
        elif name in LAUNCHERS:
            given, words = parse_launcher_options(words[1:])
            module = bool({given.pop("m", None), given.pop("module", None)} - {None})
            if given:
                sources.append(Source(name, "launcher", given, typed=True))
        elif name == "trl":
            if words[1:2] != ["sft"]:
                method = words[1] if len(words) > 1 else ""
                raise KitError(
                    f"trl {method} is no supervised fine-tuning run", "command line", "kit import trl sft ..."
                )
            format_, words = "trl", words[2:]
            break
        elif name in ("llamafactory-cli", "lmf", "llamafactory.cli"):
            if words[1:2] != ["train"]:
                raise KitError(f"{name} {' '.join(words[1:2])} does not train", "command line", f"{name} train FILE")
            format_, words = "llamafactory", words[2:]
            break
        elif name in ("axolotl", "axolotl.cli.train"):
            if name == "axolotl" and words[1:2] != ["train"]:
                raise KitError(f"axolotl {' '.join(words[1:2])} does not train", "command line", "axolotl train FILE")
            format_, words = "axolotl", words[2:] if name == "axolotl" else words[1:]
            break
        elif name.endswith((".py", ".sft")) or (module and re.fullmatch(r"\w+(\.\w+)*", words[0])):
            if other := other_runs.describe_script(words[0]):
                raise KitError(other, "command line", "the kit trains SFT of text")
            format_, script, words = "script", words[0], words[1:]
            break
        else:
            break
    if environment:
        sources.append(Source("the environment", "environment", environment, typed=True))
    given, plain = parse_options(words)
    files = [w for w in plain if w.endswith(SUFFIXES)]
    for word in plain:
        key, equals, value = word.partition("=")
        if word in files:
            continue
        if SHELL.search(word):
            raise KitError(f"{word} stands for words that are not here", "command line",
                           "put them in, or give the command without quotes, so that your shell does")  # fmt: skip
        if not equals or not re.fullmatch(r"[\w.]+", key):
            raise KitError(f"{word!r} is neither a file nor part of a command that is known", "command line",
                           "kit import FILE.yaml, or the whole command that starts the training")  # fmt: skip
        given[key] = parse_scalar(value)
    if format_ in ("", "script", "trl") and isinstance(given.get("config"), str):
        files.append(str(given.pop("config")))
    if format_ in ("", "script"):
        format_ = format_of_options(given, script, bool(files))
    own = script if format_ == "trl" and Path(script).name not in TRL_SCRIPTS else ""
    for file in files:
        source = read_source(file, "")
        source.format, source.script = detect_format(source.tree) or format_, own
        sources.append(source)
    kinds = {s.format for s in sources} & {"trl", "axolotl", "llamafactory"}
    if given:
        kind = next(iter(kinds)) if len(kinds) == 1 else format_
        sources.append(Source(source_name, kind, given, script=own, typed=True))
    if not sources:
        raise KitError("the command names no file and no option", "command line", "kit import FILE.yaml")
    return sources


def read_source(file: str, format_: str) -> Source:
    if SHELL.search(file):
        fix = "name the file, or give the command without quotes around it, so that your shell does"
        raise KitError(f"{file} stands for a file", "command line", fix)
    return Source(file, format_, read_config_file(Path(file)), Path(file).parent)


def format_of_options(given: dict[str, Any], script: str, files: bool) -> str:
    """Whose options these are. A script's own --base_model or --template do not make it Axolotl or LLaMA-Factory."""
    detected = detect_format(given)
    detected = detected if detected in ("trl", "axolotl", "llamafactory") else None  # a file's, not options'
    if script and detected in ("axolotl", "llamafactory"):
        theirs = Path(script).name in LLAMAFACTORY_SCRIPTS or {"stage", "finetuning_type"} & set(given)
        detected = "llamafactory" if theirs else "trl"
    elif script and detected is None and {word for names in NAMES.values() for word in names.split()} & set(given):
        detected = "trl"
    if not detected and not (files or not given):
        raise KitError("the command has no option of TRL, Axolotl or LLaMA-Factory", "command line",
                       "kit import FILE.yaml, or the command of one of them")  # fmt: skip
    return detected or "trl"


def parse_launcher_options(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """A launcher's own options, and the words from the script on."""
    given: dict[str, Any] = {}
    while words and is_option(words[0]):
        name, equals, value = words[0].lstrip("-").partition("=")
        name = name.replace("-", "_")
        if equals or name in LAUNCH_FLAGS or len(words) == 1:
            given[name], words = parse_scalar(value) if equals else True, words[1:]
        else:
            given[name], words = parse_scalar(words[1]), words[2:]
    return given, words


def options_as_accelerate_config(given: dict[str, Any]) -> dict[str, Any]:
    """The options of `accelerate launch` as they stand in its config file."""
    tree: dict[str, Any] = {}
    for name, value in given.items():
        if name in DEEPSPEED:
            tree.setdefault("deepspeed_config", {})[name] = value
        elif name.startswith("fsdp_"):
            tree.setdefault("fsdp_config", {})[name] = value
        elif name in ("use_deepspeed", "use_fsdp", "multi_gpu"):
            kinds = {"use_deepspeed": "DEEPSPEED", "use_fsdp": "FSDP", "multi_gpu": "MULTI_GPU"}
            tree["distributed_type"] = kinds[name]
        else:
            tree[{"cpu": "use_cpu", "num_cpu_threads_per_process": "num_cpu_threads_per_process"}.get(name, name)] = (
                value
            )
    return tree
