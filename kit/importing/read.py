"""Foreign files and command lines as plain trees: YAML and JSON by the safe loader only, everything else refused."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from kit.errors import KitError
from kit.importing.report import MOST_KEYS, Source

LARGEST = 4_000_000  # bytes
SUFFIXES = (".yaml", ".yml", ".json")
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?$")


class Loader(LOADER):
    """The safe loader, with 2e-5 as a number, dates as text, and a key given twice refused."""

    def flatten_mapping(self, node: Any) -> None:  # merges of merges grow by powers
        super().flatten_mapping(node)
        if len(node.value) > MOST_KEYS:
            raise KitError(
                f"merge keys make more than {MOST_KEYS} keys", f"line {node.start_mark.line + 1}", "write them out"
            )


def mapping(loader: Any, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for name, _ in node.value:
        line = name.start_mark.line + 1
        if isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
            if name.value in seen:
                raise KitError(
                    f"the key {name.value!r} is given twice",
                    f"lines {seen[name.value]} and {line}",
                    "keep one of them",
                )
            seen[name.value] = line
    loader.flatten_mapping(node)
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":timestamp", ":float"))]
    for first, pairs in LOADER.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^(?:[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+"
               r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)  # fmt: skip
Loader.add_constructor("tag:yaml.org,2002:map", mapping)


def text_of(path: Path) -> str:
    """The text of a config file; KitError for what cannot be one."""
    where = str(path)
    try:
        if path.is_dir():
            raise KitError(f"{path} is a folder", where, "name the file in it")
        if not path.exists():
            raise KitError(f"there is no file {path}", where, "check the path; it is taken from where you stand")
        if not path.is_file():
            raise KitError(f"{path} is no plain file", where, "name a YAML or JSON file")
        if (size := path.stat().st_size) > LARGEST:
            raise KitError(f"{path} holds {size / 1e6:.0f} MB: this is no config of a run", where, "check the path")
        data = path.read_bytes()
    except ValueError as error:  # a name with a NUL byte
        raise KitError(f"{where!r} is no path: {error}", "command line", "check it") from None
    if b"\0" in data:
        raise KitError(f"{path} is not text", where, "name a YAML or JSON file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise KitError(f"{path} is not UTF-8 text", where, "save it as UTF-8") from None
    if not text.strip():
        raise KitError(f"{path} is empty", where, "name a file with key: value lines")
    return text


def read_file(path: Path) -> dict[Any, Any]:
    """The tree of one YAML or JSON file; KitError where it is broken, is no block of keys, or asks for code."""
    text, where = text_of(path), str(path)
    try:
        tree = yaml.load(text, Loader=Loader)  # noqa: S506  a safe loader, see above
    except KitError as error:
        problem = error.problems[0]
        raise KitError(problem.problem, f"{where} {problem.where}", problem.fix) from None
    except yaml.constructor.ConstructorError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        tag = re.search(r"tag '([^']+)'", str(error.problem or ""))
        said = f"the tag {tag[1]} makes objects, and a config holds only values" if tag else str(error.problem)
        raise KitError(said, where + line, "remove the tag") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise KitError(f"not valid YAML: {error.problem or error.context}", where + line, "mend the line") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise KitError(f"not valid YAML: {' '.join(str(error).split())}", where, "mend it") from None
    except RecursionError:
        raise KitError(f"{path} is nested too deeply", where, "write it flat") from None
    if not isinstance(tree, dict):
        kind = {list: "a list", str: "text", type(None): "nothing"}.get(type(tree), "one value")
        raise KitError(f"{path} holds {kind}, not key: value lines", where, "name the tool's own config file")
    return tree


def scalar(word: str) -> Any:
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


def option(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not NUMBER.match(word)


def options(words: list[str], flags: frozenset[str] = frozenset()) -> tuple[dict[str, Any], list[str]]:
    """`--key value`, `--key=value`, `--flag`, `--list a b`, and the words before the first option."""
    found: dict[str, Any] = {}
    plain: list[str] = []
    place = 0
    while place < len(words) and not option(words[place]):
        plain.append(words[place])
        place += 1
    while place < len(words):
        name, equals, value = words[place].lstrip("-").partition("=")
        name = name.replace("-", "_")
        place += 1
        values = [value] if equals else []
        while not equals and name not in flags and place < len(words) and not option(words[place]):
            values.append(words[place])
            place += 1
        found[name] = [scalar(v) for v in values] if len(values) > 1 else scalar(values[0]) if values else True
    return found, plain


LAUNCH_FLAGS = frozenset(
    "multi_gpu use_deepspeed use_fsdp use_megatron_lm use_parallelism_config cpu tpu use_cpu m module no_python debug "
    "quiet same_network downcast_bf16 enable_cpu_affinity tee standalone no_local_rank no_ssh force_multi no_ssh_check "
    "enable_each_rank_log save_pid".split()
)
LAUNCHERS = {"torchrun": "torchrun", "torch.distributed.run": "torchrun", "torch.distributed.launch": "torchrun",
             "deepspeed": "deepspeed"}  # fmt: skip
DEEPSPEED = frozenset(
    "deepspeed_config_file zero_stage offload_optimizer_device offload_param_device offload_optimizer_nvme_path "
    "offload_param_nvme_path zero3_init_flag zero3_save_16bit_model deepspeed_hostfile deepspeed_exclusion_filter "
    "deepspeed_inclusion_filter deepspeed_multinode_launcher deepspeed_moe_layer_cls_names gradient_clipping "
    "gradient_accumulation_steps".split()
)
FSDP_QLORA = frozenset("train_type model_name context_length lora_rank use_cpu_offload sharding_strategy".split())


def read_command(words: list[str]) -> list[Source]:
    """The sources behind a command line: its launcher, the files that it names, and its own options."""
    told = "the command"
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
            given, words = launcher(words[2:] if name == "accelerate" else words[1:])
            if file := given.pop("config_file", None):
                sources.append(Source(str(file), "accelerate", read_file(Path(str(file))), Path(str(file)).parent))
            if given:
                sources.append(Source("accelerate launch", "accelerate", accelerate_tree(given)))
        elif name in LAUNCHERS:
            given, words = launcher(words[1:])
            if given:
                sources.append(Source(name, "launcher", given))
        elif name == "trl":
            if words[1:2] != ["sft"]:
                what = words[1] if len(words) > 1 else ""
                raise KitError(
                    f"trl {what} is no supervised fine-tuning run", "command line", "kit import trl sft ..."
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
            format_, words = format_ or "script", words[1:]
            break
        else:
            break
    if environment:
        sources.append(Source("the environment", "environment", environment))
    given, plain = options(words)
    files = [w for w in plain if w.endswith(SUFFIXES)]
    for word in plain:
        key, equals, value = word.partition("=")
        if word in files:
            continue
        if not equals or not re.fullmatch(r"[\w.]+", key):
            raise KitError(f"{word!r} is neither a file nor part of a command that is known", "command line",
                           "kit import FILE.yaml, or the whole command that starts the training")  # fmt: skip
        given[key] = scalar(value)
    if format_ in ("", "script", "trl") and (config := given.pop("config", None)):
        files.append(str(config))
    if format_ in ("", "script"):
        format_ = "fsdp_qlora" if given.keys() & FSDP_QLORA else detect(given) or "trl"
    for file in files:
        tree = read_file(Path(file))
        sources.append(Source(file, detect(tree) or format_, tree, Path(file).parent))
    kinds = {s.format for s in sources} & {"trl", "axolotl", "llamafactory", "fsdp_qlora"}
    if given:
        sources.append(Source(told, next(iter(kinds)) if len(kinds) == 1 else format_, given))
    if not sources:
        raise KitError("the command names no file and no option", "command line", "kit import FILE.yaml")
    return sources


def launcher(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """A launcher's own options, and the words from the script on."""
    given: dict[str, Any] = {}
    while words and option(words[0]):
        name, equals, value = words[0].lstrip("-").partition("=")
        name = name.replace("-", "_")
        if equals or name in LAUNCH_FLAGS or len(words) == 1:
            given[name], words = scalar(value) if equals else True, words[1:]
        else:
            given[name], words = scalar(words[1]), words[2:]
    for flag in ("m", "module"):  # how the script is named, not what it does
        given.pop(flag, None)
    return given, words


def accelerate_tree(given: dict[str, Any]) -> dict[str, Any]:
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


MARKS = {  # keys that only one format has
    "accelerate": "compute_environment distributed_type main_training_function downcast_bf16 rdzv_backend "
    "machine_rank same_network num_machines",
    "axolotl": "base_model micro_batch_size sequence_len lora_target_linear val_set_size sample_packing "
    "dataset_prepared_path num_epochs base_model_config lora_model_dir",
    "llamafactory": "stage finetuning_type cutoff_len lora_target lora_rank quantization_bit dataset_dir template "
    "additional_target neat_packing preprocessing_num_workers overwrite_cache",
    "fsdp_qlora": "train_type model_name context_length sharding_strategy use_cpu_offload low_memory",
    "deepspeed": "zero_optimization train_micro_batch_size_per_gpu train_batch_size",
    "trl": "model_name_or_path dataset_name use_peft lora_r lora_target_modules per_device_train_batch_size "
    "learning_rate num_train_epochs max_length max_seq_length gradient_accumulation_steps output_dir lr_scheduler_type "
    "eval_strategy evaluation_strategy save_strategy load_in_4bit dataset_train_split warmup_ratio max_steps",
}
STRONG = {"accelerate": ("compute_environment", "distributed_type"), "axolotl": ("base_model",),
          "llamafactory": ("stage", "finetuning_type", "cutoff_len"), "fsdp_qlora": ("train_type",),
          "deepspeed": ("zero_optimization",)}  # fmt: skip
KITS_OWN = ("defaults", "trainer", "peft", "dataset", "model", "launch", "runs_dir")


def detect(tree: dict[Any, Any]) -> str | None:
    """Which tool's keys these are; None where they are nobody's. KitError for the kit's own form."""
    if sum(name in tree and isinstance(tree[name], dict | list) for name in KITS_OWN) >= 2:
        raise KitError("this is the kit's own form already", "", "kit check FILE.yaml")
    for name, keys in STRONG.items():
        if any(key in tree for key in keys):
            return name
    score = {name: sum(key in tree for key in keys.split()) for name, keys in MARKS.items()}
    best = max(score, key=lambda name: score[name])
    return best if score[best] else None
