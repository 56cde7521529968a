"""Judge what `kit check --deepspeed` says of public files by DeepSpeed's own classes; by hand, with a folder of them.

    python tests/judge_deepspeed.py FOLDER --out results.json

FOLDER holds the files and index.json: [[repository, path, file], ...]. Files that are the arguments of
another trainer (TRL, Megatron, GPT-NeoX) are left out. The results hold names and counts, never what is in a file.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
from kit.config.deepspeed.findings import REFUSE, FileFinding, find_faults
from kit.config.deepspeed.fixes import apply_fixes
from kit.errors import KitError
from kit.schema import fields
from kit.schema.dotted import value_at

OTHERS = {"output_dir", "model_name_or_path", "num-layers", "num_layers", "pipe-parallel-size", "learning_rate"}
BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
FILLED = {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "gradient_clipping": 1.0,
          "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}  # fmt: skip


def fill(tree: Any) -> Any:
    """Put plain numbers for what the trainer fills; another "auto" goes, as DeepSpeed drops it."""
    if not isinstance(tree, dict):
        return tree
    return {
        k: fill(FILLED[k] if v == "auto" and k in FILLED else v)
        for k, v in tree.items()
        if not (v == "auto" and k not in FILLED)
    }


def deepspeed_refuses(tree: dict[str, Any]) -> str:
    """Return why DeepSpeedConfig refuses a tree on one process, "" where it takes it."""
    from deepspeed.runtime.config import DeepSpeedConfig

    tree = fill(copy.deepcopy(tree))
    if all(tree.get(name) is not None for name in BATCHES[:2]):
        del tree["train_batch_size"]  # of another number of processes
    try:
        DeepSpeedConfig(tree)
    except Exception as error:  # noqa: BLE001  pydantic's, asserts, KeyErrors: a refusal is a refusal
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return ""


def alone(tree: dict[str, Any], finding: FileFinding) -> dict[str, Any]:
    """Build a file that is right but for the key of one finding."""
    out: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1}
    block, source = out, tree
    for part in finding.path[:-1]:
        source = source.get(part, {})
        block = block.setdefault(part, {k: source[k] for k in ("stage", "type", "device", "enabled") if k in source})
    if finding.path[-1] in source:
        block[finding.path[-1]] = source[finding.path[-1]]
    if finding.rule == "missing":
        out.pop(finding.path[-1], None)
    return out


def judge(tree: dict[str, Any], finding: FileFinding) -> str:
    """Say whether a refusal is right, and by whose word."""
    import torch

    if deepspeed_refuses(alone(tree, finding)) or (finding.rule == "missing" and deepspeed_refuses(tree)):
        return "DeepSpeed refuses it"
    if len(finding.path) == 1 and finding.path[0] not in fields.field_tables()["deepspeed"]:
        return "DeepSpeed passes over it without a word"
    if finding.key == "optimizer.type" and not hasattr(torch.optim, str(value_at(tree, "optimizer.type"))):
        return "the engine finds no such optimizer"
    if finding.rule == "deepspeed" or finding.path[0] in ("scheduler", "optimizer"):
        return "DeepSpeed does not read it, or its engine refuses it"
    if finding.rule == "renamed-key":
        return "DeepSpeed reads it and warns: transformers does not read it"
    if finding.rule == "kind":
        return "text that the engine or transformers takes for a number or a truth value"
    return "WRONG"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    logging.disable(logging.CRITICAL)
    counts: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    named = []
    for repository, path, name in json.loads((a.folder / "index.json").read_text()):
        text = (a.folder / name).read_bytes().decode("utf-8-sig", errors="replace")
        try:
            tree = json.loads(text)
        except ValueError:
            counts["no JSON: a template with placeholders or comments"] += 1
            continue
        if OTHERS & set(tree):
            continue
        named.append([repository, path])
        findings = find_faults(text, path)
        wrong = [f for f in findings if f.severity == REFUSE]
        counts["files"] += 1
        counts["exit 0" if not wrong else "exit 2"] += 1
        counts["findings that refuse"] += len(wrong)
        counts["warnings"] += len(findings) - len(wrong)
        for finding in wrong:
            verdict = judge(tree, finding)
            verdicts[verdict] += 1
            examples.setdefault(f"{verdict}: {finding.key}", []).append(f"{repository} {path}")
        if not wrong and (reason := deepspeed_refuses(tree)):
            counts["missed: exit 0, and DeepSpeed refuses"] += 1
            examples.setdefault(f"missed: {reason}", []).append(f"{repository} {path}")
        try:
            mended, _ = apply_fixes(text, find_faults)
        except KitError as error:
            counts["--fix fails"] += 1
            examples.setdefault(f"--fix: {error}", []).append(f"{repository} {path}")
            continue
        if not [f for f in find_faults(mended) if f.severity == REFUSE]:
            counts["mended whole by --fix, or right before"] += 1
            if reason := deepspeed_refuses(json.loads(mended)):
                counts["mended, and DeepSpeed refuses"] += 1
                examples.setdefault(f"mended: {reason}", []).append(f"{repository} {path}")
    result = {"counts": dict(counts), "refusals": dict(verdicts), "files": named}
    print(json.dumps({k: v for k, v in result.items() if k != "files"}, indent=1))
    for key, places in sorted(examples.items()):
        print(f"{len(places):4} {key}   e.g. {places[0]}", file=sys.stderr)
    if a.out:
        from importlib.metadata import version

        head = {"deepspeed": version("deepspeed"), "transformers": version("transformers")}
        a.out.write_text(json.dumps(head | result, indent=1) + "\n")
    return int(bool(verdicts["WRONG"]))


if __name__ == "__main__":
    sys.exit(main())
