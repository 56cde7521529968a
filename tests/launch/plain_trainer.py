"""An ordinary Hugging Face training script, as users have it: `deepspeed plain_trainer.py ds_config.json`."""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed


def main(ds_config, output_dir="out"):
    set_seed(0)
    args = TrainingArguments(
        output_dir, deepspeed=ds_config, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, use_cpu=not torch.cuda.is_available(), logging_steps=1, save_strategy="no", report_to=[],
    )  # fmt: skip
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    rows = torch.randint(64, (32, 16), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=model, args=args, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print("losses", main(*sys.argv[1:]))
