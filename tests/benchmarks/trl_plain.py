"""The peer: a plain TRL script as people write it, started by `deepspeed`. `trl_plain.py SETTINGS.json`."""

from __future__ import annotations

import json
import sys
import time

begun = time.time()

import torch  # noqa: E402
from datasets import load_dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402


class Clock(TrainerCallback):
    """Wall-clock time at the end of every step, with the device idle."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.at.append(time.time())


def main(path: str) -> None:
    settings = json.load(open(path))
    args = SFTConfig(**settings["sft"])
    clock = Clock()
    trainer = SFTTrainer(
        model=settings["model"],
        args=args,
        train_dataset=load_dataset("json", data_files=settings["data"], split="train"),
        peft_config=LoraConfig(**settings["peft"]),
        callbacks=[clock],
    )
    saves: list[float] = []
    upstream = trainer._save_checkpoint

    def timed(*a, **k):
        start = time.time()
        upstream(*a, **k)
        saves.append(time.time() - start)

    trainer._save_checkpoint = timed
    trainer.train()
    trainer.save_model()
    if trainer.args.process_index == 0:
        history = [row for row in trainer.state.log_history if "loss" in row]
        figures = {
            "begun": begun,
            "step_ends": clock.at,
            "losses": [row["loss"] for row in history],
            "checkpoint_seconds": saves,
            "peak_gb": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        }
        with open(settings["out"], "w") as f:
            json.dump(figures, f)


if __name__ == "__main__":
    main([a for a in sys.argv[1:] if not a.startswith("--local_rank")][0])
