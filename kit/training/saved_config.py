"""The config of a fully tuned model: as its base had it, but for what the run meant to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kit.storage.safetensors_header import find_model_folder

TRAINING_ONLY = ("use_cache", "output_router_logits", "router_aux_loss_coef")


def config_before_training(model: Any, revision: str | None = None) -> dict[str, dict]:
    """config and generation_config as they were before a trainer touched them; empty where that cannot be known.

    model: a folder, a Hub id, or a model that no trainer has had yet.
    """
    if isinstance(model, str):
        folder = find_model_folder(model, revision)
        files = {name: folder / f"{name}.json" for name in ("config", "generation_config")} if folder else {}
        return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}
    configs = {name: getattr(model, name, None) for name in ("config", "generation_config")}
    return {name: json.loads(value.to_json_string()) for name, value in configs.items() if value is not None}


def restore_config(folder: Path, before: dict[str, dict], tokenizer: Any, keep_pad: bool = False) -> None:
    """Undo in a saved model's JSON what training set for its own sake. Rewrites config.json, generation_config.json.

    Trainer sets use_cache and copies the tokenizer's special ids into both configs, TRL sets the padding id and
    the router keys. An end token that the base did not know was given by the run's tokenizer and stays.
    keep_pad: the run named a padding token itself.
    """
    end = getattr(tokenizer, "eos_token_id", None)
    for name, original in before.items():
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        now = json.loads(path.read_text(encoding="utf-8"))
        for part, was in [(now, original), *((now.get(k), original.get(k)) for k in ("text_config",))]:
            if not isinstance(part, dict) or not isinstance(was, dict):
                continue
            keys = [*TRAINING_ONLY, "bos_token_id", *([] if keep_pad else ["pad_token_id"])]
            known_end = was.get("eos_token_id")
            if end in (known_end if isinstance(known_end, list) else [known_end]):
                keys.append("eos_token_id")
            for key in keys:
                if key in was and (key in part or was[key] is not None):
                    part[key] = was[key]
                elif key not in was:
                    part.pop(key, None)
        path.write_text(json.dumps(now, indent=2, sort_keys=True) + "\n", encoding="utf-8")
