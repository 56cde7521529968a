"""Foreign files and command lines as plain trees: YAML and JSON by the safe loader only, everything else refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from kit.errors import KitError
from kit.foreign import other_runs
from kit.foreign.tree import MAX_KEYS
from kit.schema.run_plan import RunInput

MOST_BYTES = 4_000_000  # bytes
SUFFIXES = (".yaml", ".yml", ".json")
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class SafeConfigLoader(LOADER):
    """The safe loader, with 2e-5 as a number, dates as text, and a key given twice refused."""

    def flatten_mapping(self, node: Any) -> None:  # merges of merges grow by powers
        super().flatten_mapping(node)
        if len(node.value) > MAX_KEYS:
            raise KitError(
                f"merge keys make more than {MAX_KEYS} keys", f"line {node.start_mark.line + 1}", "write them out"
            )


def construct_mapping(loader: Any, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
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


SafeConfigLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":timestamp", ":float"))]
    for first, pairs in LOADER.yaml_implicit_resolvers.items()
}
SafeConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^(?:[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+"
               r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)  # fmt: skip
SafeConfigLoader.add_constructor("tag:yaml.org,2002:map", construct_mapping)


def read_text(path: Path) -> str:
    """The text of a config file; KitError for what cannot be one."""
    where = str(path)
    try:
        if path.is_dir():
            raise KitError(f"{path} is a folder", where, "name the file in it")
        if not path.exists():
            raise KitError(f"there is no file {path}", where, "check the path; it is taken from where you stand")
        if not path.is_file():
            raise KitError(f"{path} is no plain file", where, "name a YAML or JSON file")
        if (size := path.stat().st_size) > MOST_BYTES:
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


def read_config_file(path: Path) -> dict[Any, Any]:
    """The tree of one YAML or JSON file; KitError where it is broken, is no block of keys, or asks for code."""
    text, where = read_text(path), str(path)
    try:
        tree = yaml.load(text, Loader=SafeConfigLoader)  # noqa: S506  a safe loader, see above
    except KitError as error:
        problem = error.problems[0]
        raise KitError(problem.problem, f"{where} {problem.where}", problem.fix) from None
    except yaml.constructor.ConstructorError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        tag = re.search(r"tag '([^']+)'", str(error.problem or ""))
        message = f"the tag {tag[1]} makes objects, and a config holds only values" if tag else str(error.problem)
        raise KitError(message, where + line, "remove the tag") from None
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


KEYS_OF_FORMAT = {  # keys that only one format has
    "accelerate": "compute_environment distributed_type main_training_function downcast_bf16 rdzv_backend "
    "machine_rank same_network num_machines",
    "axolotl": "base_model micro_batch_size sequence_len lora_target_linear val_set_size sample_packing "
    "dataset_prepared_path num_epochs base_model_config lora_model_dir",
    "llamafactory": "stage finetuning_type cutoff_len lora_target lora_rank quantization_bit dataset_dir template "
    "additional_target neat_packing preprocessing_num_workers overwrite_cache",
    "deepspeed": "zero_optimization train_micro_batch_size_per_gpu train_batch_size",
    "trl": "model_name_or_path dataset_name use_peft lora_r lora_target_modules per_device_train_batch_size "
    "learning_rate num_train_epochs max_length max_seq_length gradient_accumulation_steps output_dir "
    "lr_scheduler_type eval_strategy evaluation_strategy save_strategy load_in_4bit dataset_train_split "
    "warmup_ratio max_steps",
}
DECISIVE_KEYS = {"accelerate": ("compute_environment", "distributed_type"), "axolotl": ("base_model",),
          "llamafactory": ("stage", "finetuning_type", "cutoff_len"),
          "deepspeed": ("zero_optimization",)}  # fmt: skip
TOOLS = {"trl": "TRL", "axolotl": "Axolotl", "llamafactory": "LLaMA-Factory", "accelerate": "accelerate",
         "deepspeed": "DeepSpeed", "launcher": "the launcher"}  # fmt: skip
READ_HERE = "TRL and transformers, accelerate, DeepSpeed, Axolotl and LLaMA-Factory"
KIT_SECTIONS = ("defaults", "trainer", "peft", "dataset", "model", "launch", "runs_dir")


def detect_format(tree: dict[Any, Any]) -> str | None:
    """Which tool's keys these are; None where they are nobody's. KitError for the kit's own form."""
    if tool := other_runs.describe_tool(tree):
        raise KitError(f"these are the keys of {tool}", "", f"kit import reads files of {READ_HERE}")
    own = sum(name in tree and isinstance(tree[name], dict | list) for name in KIT_SECTIONS) >= 2
    if own and set(tree) <= {*RunInput.model_fields, "defaults", "hydra", "hparams_search"}:
        raise KitError("this is the kit's own form already", "", "kit check FILE.yaml")
    for name, keys in DECISIVE_KEYS.items():
        if any(key in tree for key in keys):
            return name
    score = {name: sum(key in tree for key in keys.split()) for name, keys in KEYS_OF_FORMAT.items()}
    best = max(score, key=lambda name: score[name])
    return best if score[best] else None


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
