"""Finds where each key of a composed tree was set: the file and line of every value, and the value as written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kit.system import paths

GROUPS = (
    "model tokenizer dataset peft quantization deepspeed fsdp trainer launch tracking hparams_search recipe"
).split()
RUN_FILE = "file-"  # what a user's run.yaml is called among the recipes
# Dotted key: where one file (or the command line) sets it, and what is written there.
Layer = dict[str, tuple[str, str]]


def read_layers(choices: dict[str, Any], sources: list[Path], run_file: Path | None) -> list[Layer]:
    """Read what the primary config, each chosen group file, and the recipe set, in this order."""

    def find_file(group: str, name: str) -> Path | None:
        if group == "recipe" and run_file is not None and name.startswith(RUN_FILE):
            return run_file
        if group == "deepspeed" and (file := paths.DS_CONFIGS / f"{name}.json").is_file():
            return file
        return next((f for s in sources if (f := s / group / f"{name}.yaml").is_file()), None)

    layers = [read_file_layer(paths.CONF / "train.yaml", "")]
    for group in [g for g in GROUPS if g != "recipe"]:
        if (name := choices.get(group)) and (file := find_file(group, str(name))):
            layers.append(read_file_layer(file, group))
    pending, seen = [str(choices["recipe"])] if choices.get("recipe") else [], []
    while pending:  # a recipe may stand on another one; the outer one wins, so it is read last
        name = pending.pop()
        if (file := find_file("recipe", name)) is None or file in seen:
            continue
        seen.append(file)
        pending += [d for d in (read_yaml(file).get("defaults") or []) if isinstance(d, str) and d != "_self_"]
    for file in reversed(seen):
        layer = read_file_layer(file, "")
        if "dataset" in layer and choices.get("dataset") == "none":  # `dataset: my.jsonl`
            layer["dataset.path"] = layer.pop("dataset")
        layers.append(layer)
    return layers


def read_yaml(file: Path) -> dict[str, Any]:
    content = yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return content if isinstance(content, dict) else {}


def read_file_layer(file: Path, prefix: str, blocks: bool = False) -> Layer:
    """Read (`folder/file:line`, value as written) by dotted key, for every leaf of a YAML or JSON file.

    `blocks`: also where each block begins, as `key.`, for what is said of a block that has no place here.
    """
    text = file.read_text(encoding="utf-8")
    label = f"{file.parent.name}/{file.name}" if paths.ROOT in file.resolve().parents else str(file)
    layer: Layer = {}

    def walk(node: yaml.Node | None, key: str) -> None:
        if isinstance(node, yaml.MappingNode) and node.value:
            for name, value in node.value:
                if blocks and isinstance(value, yaml.MappingNode):
                    layer[f"{key}.{name.value}."] = (f"{label}:{name.start_mark.line + 1}", "")
                if not (key == "" and name.value in ("defaults", "hydra")):
                    walk(value, f"{key}.{name.value}" if key else str(name.value))
        elif node is not None and key:
            written = text[node.start_mark.index : node.end_mark.index].strip()
            layer[key] = (f"{label}:{node.start_mark.line + 1}", written)

    walk(yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), prefix)
    return layer


def read_deepspeed_file_layer(deepspeed: Any) -> Layer:
    """Read where `deepspeed.file` sets its keys; nothing where it cannot be read, which sections.py reports."""
    file = deepspeed.get("file") if isinstance(deepspeed, dict) else None
    try:
        return read_file_layer(Path(file).expanduser(), "deepspeed", blocks=True) if isinstance(file, str) else {}
    except (OSError, ValueError, RuntimeError, yaml.YAMLError):  # RuntimeError: ~nobody, and nested too deeply
        return {}
