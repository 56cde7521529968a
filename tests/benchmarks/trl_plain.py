"""The peer: a plain TRL script as people write it, alone or started by `deepspeed`. `trl_plain.py SETTINGS.json`.

`expert` in the settings: what trl_expert.py adds to it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import trl.trainer.sft_trainer as upstream
import trl_expert
from clock import Clock, watched
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer


def load_rows(settings: dict):
    """The file's rows; `template` and `split` as source scripts have them: one text, 80/10/10 by two splits."""
    kind = "parquet" if settings["data"].endswith(".parquet") else "json"
    rows = load_dataset(kind, data_files=settings["data"], split="train")
    if template := settings.get("template"):
        rows = rows.map(lambda row: {"text": template.format(**row)}, remove_columns=rows.column_names)
    if settings.get("split"):
        rows = rows.train_test_split(test_size=0.2, seed=42)["train"]
    return rows


def main(path: str) -> None:
    settings = json.load(open(path))
    if quantization := settings.get("quantization"):
        fields = {k: v for k, v in quantization.items() if k != "quant_method" and v is not None}
        init = settings["sft"].setdefault("model_init_kwargs", {})
        init["quantization_config"] = BitsAndBytesConfig(**fields)
    if settings["sft"].get("deepspeed") and settings["sft"].get("use_cpu"):  # zero.Init asks it
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    expert = settings.get("expert") or {}
    if expert.get("varlen"):
        trl_expert.register_varlen()
    args = SFTConfig(**settings["sft"])
    clock = Clock()
    upstream.create_model_from_path = watched(upstream.create_model_from_path)
    trainer = SFTTrainer(
        model=settings["model"],
        args=args,
        train_dataset=load_rows(settings),
        processing_class=AutoTokenizer.from_pretrained(settings["tokenizer"]) if settings.get("tokenizer") else None,
        peft_config=LoraConfig(**settings["peft"]) if settings.get("peft") else None,
        callbacks=[clock],
    )
    saves: list[float] = []
    save_checkpoint = trainer._save_checkpoint

    def timed(*a, **k):
        start = time.time()
        save_checkpoint(*a, **k)
        saves.append(time.time() - start)

    trainer._save_checkpoint = timed
    if expert.get("bf16_adapters"):
        trl_expert.cast_adapters(trainer.model, torch.bfloat16)
    with trl_expert.cudnn_first() if expert.get("cudnn") else contextlib.nullcontext():
        trainer.train()
    if settings.get("save", True):
        trainer.save_model()
    if trainer.args.process_index == 0:
        history = [row for row in trainer.state.log_history if "loss" in row]
        figures = clock.figures | {
            "losses": [row["loss"] for row in history],
            "checkpoint_seconds": saves,
            "peak_gb": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        }
        with open(settings["out"], "w") as f:
            json.dump(figures, f)


if __name__ == "__main__":
    main([a for a in sys.argv[1:] if not a.startswith("--local_rank")][0])
