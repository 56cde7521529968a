"""The files of a merged model beside its weights: index, config, tokenizer, generation config, code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from kit.errors import KitError
from kit.inspection.tokenizer import read_tokenizer_files
from kit.merging.parts import MergePlan
from kit.storage.json_files import read_json
from kit.storage.safetensors_header import INDEX, read_header

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "*.tiktoken", "chat_template*", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "additional_chat_templates/*",
)  # fmt: skip


def write_index(plan: MergePlan, staging: Path) -> None:
    """Write the index of the merged shards, in the order of the base\'s, where the base has one."""
    if not plan.indexed:
        return
    headers = {file: read_header(staging / file) for file in plan.shards}
    index = read_json(plan.base / INDEX)
    files = {t.name: file for file, tensors in headers.items() for t in tensors}
    order = [*index["weight_map"], *(n for n in files if n not in index["weight_map"])]
    index["weight_map"] = {n: files[n] for n in order}
    size = sum(t.end - t.start for tensors in headers.values() for t in tensors)
    index["metadata"] = {**(index.get("metadata") or {}), "total_size": size}
    (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_config(plan: MergePlan, staging: Path) -> None:
    """Write config.json: the base\'s bytes where nothing in it changes."""
    if plan.changes:
        (staging / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(plan.base / "config.json", staging / "config.json")


def copy_side_files(plan: MergePlan, staging: Path) -> None:
    """Generation config and code of the base; tokenizer and chat template of the adapter, else of the base."""
    for pattern in ("generation_config.json", "*.py"):
        _copy_matching(plan.base, pattern, staging)
    trained = plan.adapter.folder
    has_own = any((trained / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    for folder in [trained] if has_own else [plan.base, trained]:
        for pattern in TOKENIZER_FILES:
            _copy_matching(folder, pattern, staging)
    if has_own:
        add_end_token(plan.config, staging)


def add_end_token(config: dict[str, Any], staging: Path) -> None:
    """Generation stops at the end token that the run trained, and at those that the base knew."""
    files = read_tokenizer_files(staging)
    end = files and (files.tokens or {}).get(files.roles.get("eos_token") or "")
    if end is None:
        return
    path = staging / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    known = generation.get("eos_token_id", config.get("eos_token_id"))
    known = known if isinstance(known, list) else [] if known is None else [known]
    if end not in known:
        generation["eos_token_id"] = [end, *known]
        path.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def _copy_matching(folder: Path, pattern: str, staging: Path) -> None:
    for path in sorted(folder.glob(pattern)):
        if path.is_file():
            target = staging / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def check_tokenizer_fits(plan: MergePlan) -> None:
    """KitError where the adapter's tokenizer knows tokens that the embeddings have no row for."""
    rows = plan.vocabulary or (plan.config.get("text_config") or {}).get("vocab_size") or plan.config.get("vocab_size")
    trained = read_tokenizer_files(plan.adapter.folder)
    if trained is None or not rows or trained.size <= rows:
        return
    base = read_tokenizer_files(plan.base)
    if base is None or base.size < trained.size:  # some bases name a token that they have no row for themselves
        raise KitError(
            f"the tokenizer saved with the adapter reaches id {trained.size - 1}, the embeddings have {rows} rows",
            where=str(plan.adapter.folder / "tokenizer.json"),
            fix="save the adapter with its resized embeddings (save_embedding_layers=true)",
        )
