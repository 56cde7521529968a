"""DeepSpeed by itself on the mistake's JSON: `mistakes_deepspeed.py MODEL FILE.json [bitsandbytes]`."""

import json
import sys

import deepspeed
import torch
from transformers import AutoModelForCausalLM

deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
config = {k: v for k, v in json.load(open(sys.argv[2])).items() if v != "auto"}  # "auto" is the Trainer's word
if not {"train_batch_size", "train_micro_batch_size_per_gpu"} & set(config):
    config["train_micro_batch_size_per_gpu"] = 2
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
if sys.argv[3:]:
    import bitsandbytes

    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-4)
else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
ids = torch.arange(32).reshape(2, 16)
for _ in range(4):
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
print("done")
