"""Saving and stopping with several ranks: `deepspeed --num_gpus 2 ranks.py FOLDER ENGINE`, ENGINE ddp, zero2 or zero3.

Every rank writes FOLDER/rank<N>.json; test_ranks.py reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def ds_config(stage: int) -> dict:
    zero = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 100  # small matrices are cut up too
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
    }


def main(folder: Path, engine: str) -> None:
    from kit.training import signals

    signals.install_handlers()

    import tiny
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig

    from kit.errors import KitError
    from kit.storage import manifest
    from kit.training.trainer import ModifiedTrainer

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    if engine != "ddp":
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")

    def sha(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def build(name, callbacks=(), peft=True, **changes):
        lora = LoraConfig(
            r=4,
            lora_dropout=0.1,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            modules_to_save=changes.pop("extra", None),
        )
        settings = dict(
            output_dir=str(folder / name), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
            logging_steps=1, save_strategy="steps", save_steps=2, use_cpu=True, bf16=False, report_to="none",
            model_init_kwargs={"dtype": "float32"}, gradient_checkpointing=False, max_length=64, disable_tqdm=True,
            deepspeed=None if engine == "ddp" else ds_config(int(engine[-1])), seed=7,
        )  # fmt: skip
        args = SFTConfig(**{**settings, **changes})
        rows = tiny.dataset(tiny.text_rows())
        more = {"peft_config": lora} if peft else {}
        model = str(folder / ("tied" if name == "full-tied" else "base"))
        return ModifiedTrainer(model=model, args=args, train_dataset=rows, callbacks=list(callbacks), **more)

    found: dict = {}
    done = lambda: (folder / f"rank{rank}.json").write_text(json.dumps(found, indent=1))  # noqa: E731

    # one whole run, and the same run resumed half-way
    whole = build("whole")
    whole.train()
    whole.save_model(str(folder / "adapter"))
    found["losses"] = [h["loss"] for h in whole.state.log_history if "loss" in h]
    found["verify"] = manifest.verify_folder(folder / "adapter") + manifest.verify_folder(
        folder / "whole" / "checkpoint-4"
    )
    again = build("again")
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    name = "adapter_model.safetensors"
    found["resumed"] = [h["loss"] for h in again.state.log_history if "loss" in h]
    found["bytes"] = [sha(folder / run / "checkpoint-4" / name) for run in ("whole", "again")]
    done()

    # a signal on rank 1 alone
    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    stopped = build("stopped", [Kill()], max_steps=12, save_strategy="no")
    stopped.train()
    found["stopped"] = [stopped.stopped_by_signal, stopped.state.global_step]
    found["stopped verify"] = manifest.verify_folder(folder / "stopped" / f"checkpoint-{stopped.state.global_step}")
    signals.forget_signals()
    done()

    # a failure on the writer alone is everybody's failure
    broken = build("broken", max_steps=2)
    if rank == 0:

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        broken.processing_class.save_pretrained = full
    try:
        broken.train()
    except KitError as error:
        found["broken"] = [error.code, str(error)]
    if rank == 0:
        found["broken left"] = sorted(p.name for p in (folder / "broken").iterdir() if p.is_dir())
    done()

    # a fully trained head beside the adapter, and full fine-tuning
    head = build("head", max_steps=2, extra=["lm_head"])
    head.train()
    found["head"] = manifest.verify_folder(folder / "head" / "checkpoint-2")
    done()
    for name in ("full", "full-tied"):
        full_run = build(name, peft=False, max_steps=2)
        full_run.train()
        full_run.save_model(str(folder / name / "model"))
        found[name] = manifest.verify_folder(folder / name / "model")
        done()
    if rank == 0 and engine != "zero3":
        own = dict(full_run.model.named_parameters())
        loaded = dict(AutoModelForCausalLM.from_pretrained(folder / "full-tied" / "model").named_parameters())
        found["equal"] = all(torch.equal(own[k].float(), loaded[k]) for k in loaded)
    found["end"] = True
    done()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
