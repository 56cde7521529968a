"""A TRL script as its documentation writes it, for one mistake: `mistakes_plain.py SETTINGS.json`."""

import json
import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

s = json.load(open(sys.argv[1]))
if s["sft"].get("deepspeed"):  # on a CPU zero.Init asks for the process group before anybody has made it
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
init = s["init"]
if s["quant"]:
    kinds = {k: getattr(torch, v) if v in ("bfloat16", "uint8") and "dtype" in k else v for k, v in s["quant"].items()}
    init["quantization_config"] = BitsAndBytesConfig(**kinds)
args = SFTConfig(**s["sft"], model_init_kwargs=init or None)
rows = load_dataset("json", data_files=s["data"], split="train")
held = rows.select(range(4)) if s["eval"] else None
model, peft = s["model"], None if s["full"] else LoraConfig(**s["peft"])
if s["adapter"]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), s["adapter"], is_trainable=True)
    peft = None
trainer = SFTTrainer(model=model, args=args, train_dataset=rows, eval_dataset=held, peft_config=peft)
trainer.train(resume_from_checkpoint=s["resume"])
trainer.save_model()
print("done")
