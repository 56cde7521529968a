"""A command line that starts a training: its launcher, the files that it names, and its own options."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from kit.errors import KitError
from kit.importing.read import SUFFIXES, detect_format, read_config_file
from kit.importing.report import Source

NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?$")


def parse_scalar(word: str) -> Any:
    """A word of a command line as a value: numbers, true, false, none and JSON; the rest is text."""
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    if word.lower() in ("none", "null"):
        return None
    if NUMBER.match(word):
        return int(word) if re.fullmatch(r"[-+]?\d+", word) else float(word.replace("_", ""))
    if word[:1] in "{[":
        try:
            return json.loads(word)
        except ValueError:
            return word
    return word


def is_option(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not NUMBER.match(word)


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


OTHER_METHODS = set("dpo orpo kto cpo bco ppo rloo grpo gkd reward prm nash xpo vlm".split())


def read_command(words: list[str]) -> list[Source]:
    """The sources behind a command line: its launcher, the files that it names, and its own options."""
    source_name = "the command"
    sources: list[Source] = []
    environment: dict[str, Any] = {}
    if len(words) == 1 and re.search(r"\s", words[0]):
        try:
            words = shlex.split(words[0].replace("\\\n", " "))
        except ValueError as error:
            raise KitError(f"the command cannot be split into words: {error}", "command line", "quote it") from None
    format_ = ""
    while words:
        name = Path(words[0]).name
        if re.match(r"[A-Za-z_]\w*=", words[0]) and not format_:
            key, _, value = words[0].partition("=")
            environment[key] = value
            words = words[1:]
        elif re.fullmatch(r"python[\d.]*", name):
            words = words[1:]
            while words and words[0] in ("-u", "-m"):
                words = words[1:]
        elif name in ("uv", "poetry", "pipenv") and words[1:2] == ["run"]:
            words = words[2:]
        elif name in ("env", "nohup", "time", "srun"):
            words = words[1:]
        elif name == "accelerate" and words[1:2] == ["launch"] or name == "accelerate.commands.launch":
            given, words = parse_launcher_options(words[2:] if name == "accelerate" else words[1:])
            if file := given.pop("config_file", None):
                sources.append(
                    Source(str(file), "accelerate", read_config_file(Path(str(file))), Path(str(file)).parent)
                )
            if given:
                sources.append(Source("accelerate launch", "accelerate", options_as_accelerate_config(given)))
        elif name in LAUNCHERS:
            given, words = parse_launcher_options(words[1:])
            if given:
                sources.append(Source(name, "launcher", given))
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
        elif name.endswith((".py", ".sft")):
            if other := OTHER_METHODS & set(name.removesuffix(".py").split("_")):
                raise KitError(
                    f"{name} ({min(other)}) is no supervised fine-tuning of text", "command line", "the kit trains SFT"
                )
            format_, words = format_ or "script", words[1:]
            break
        else:
            break
    if environment:
        sources.append(Source("the environment", "environment", environment))
    given, plain = parse_options(words)
    files = [w for w in plain if w.endswith(SUFFIXES)]
    for word in plain:
        key, equals, value = word.partition("=")
        if word in files:
            continue
        if not equals or not re.fullmatch(r"[\w.]+", key):
            raise KitError(f"{word!r} is neither a file nor part of a command that is known", "command line",
                           "kit import FILE.yaml, or the whole command that starts the training")  # fmt: skip
        given[key] = parse_scalar(value)
    if format_ in ("", "script", "trl") and (config := given.pop("config", None)):
        files.append(str(config))
    if format_ in ("", "script"):
        format_ = detect_format(given) or ("trl" if files or not given else "")
        if not format_:
            raise KitError("the command has no option of TRL, Axolotl or LLaMA-Factory", "command line",
                           "kit import FILE.yaml, or the command of one of them")  # fmt: skip
    for file in files:
        tree = read_config_file(Path(file))
        sources.append(Source(file, detect_format(tree) or format_, tree, Path(file).parent))
    kinds = {s.format for s in sources} & {"trl", "axolotl", "llamafactory"}
    if given:
        sources.append(Source(source_name, next(iter(kinds)) if len(kinds) == 1 else format_, given))
    if not sources:
        raise KitError("the command names no file and no option", "command line", "kit import FILE.yaml")
    return sources


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
    for flag in ("m", "module"):  # how the script is named, not what it does
        given.pop(flag, None)
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
