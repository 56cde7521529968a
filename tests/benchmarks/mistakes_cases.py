"""Common mistakes as data: what the kit is told, and the same told to a plain script and to other tools.

CASES are twenty that users make; FAULTS are what goes wrong silently, late, or at a resume.
A case says it once for each: `kit` overrides; `sft`, `peft`, `quant`, `init` (keywords of SFTConfig, LoraConfig,
BitsAndBytesConfig, from_pretrained); `ds` (a DeepSpeed JSON; `ds_alone`: why it is right without the rest); `lf` and
`ax` (keys of a LLaMA-Factory or Axolotl YAML; a string instead: why it cannot be said there). `thread` is where users
met it, `warned` what a warning about it would hold. `rule` is what the kit says (None: it makes it right).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from conftest import write_rows

ZERO2: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2},
}
ZERO3 = {**ZERO2, "zero_optimization": {"stage": 3}}
OFFLOAD = {**ZERO2, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
DECAY = {"type": "WarmupDecayLR", "params": {"total_num_steps": 5000, "warmup_num_steps": 4000}}
FSDP = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
ANSWERS = "its masks come from its own templates, not from a {% generation %} mark"
OWN = "it has templates of its own, and one of them must be named"

CASES: list[dict[str, Any]] = [
    {
        "id": "typo-in-json",
        "what": "`gradient_cliping` in the ZeRO-3 JSON",
        "thread": "LlamaFactory#1116",
        "kit": ["deepspeed.file={ds}"],
        "rule": ("unknown-key", "gradient_cliping"),
        "ds": {**{k: v for k, v in ZERO3.items() if k != "gradient_clipping"}, "gradient_cliping": 0.3},
    },
    {
        "id": "text-for-number",
        "what": '`"train_micro_batch_size_per_gpu": "8"` in the JSON',
        "thread": "LlamaFactory#1116",
        "kit": ["deepspeed.file={ds}"],
        "rule": ("kind", "train_micro_batch_size_per_gpu"),
        "ds": {**ZERO2, "train_micro_batch_size_per_gpu": "8"},
    },
    {
        "id": "batch-arithmetic",
        "what": "`train_batch_size` 64 in the JSON, 2 x 1 x 1 in the trainer",
        "thread": "transformers#29348, apps#9",
        "kit": ["deepspeed.file={ds}", "trainer.per_device_train_batch_size=2"],
        "rule": ("mismatch", "train_batch_size"),
        "ds": {**ZERO2, "train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1},
    },
    {
        "id": "scheduler-steps",
        "what": "`warmup_num_steps` 4000 of 5000 in the JSON's scheduler, a run of 4 steps",
        "thread": "transformers#12021, #29348",
        "kit": ["deepspeed.file={ds}", "trainer.max_steps=4"],
        "rule": ("mismatch", "scheduler.params"),
        "sft": {"max_steps": 4},
        "ds": {**ZERO2, "scheduler": DECAY},
    },
    {
        "id": "adam8bit-offload",
        "what": "`optim: adamw_bnb_8bit` with the optimizer offloaded to the CPU",
        "thread": "DeepSpeed#1846",
        "kit": ["deepspeed.file={ds}", "trainer.optim=adamw_bnb_8bit"],
        "rule": ("offload-optimizer", "trainer.optim"),
        "warned": "CPUAdam|CPU Adam",
        "sft": {"optim": "adamw_bnb_8bit"},
        "ds": OFFLOAD,
        "ds_optimizer": "bitsandbytes",
        "lf": "bitsandbytes, which it needs for this, does not come with it",
        "ax": {"optimizer": "adamw_bnb_8bit"},
    },
    {
        "id": "qlora-zero3-storage",
        "what": "QLoRA under ZeRO-3 with `bnb_4bit_quant_storage` left at uint8",
        "thread": "peft#2016, #1418, transformers#26412",
        "kit": ["deepspeed.file={ds}", "quantization=nf4", "quantization.bnb_4bit_quant_storage=uint8"],
        "rule": ("quantized-storage", "bnb_4bit_quant_storage"),
        "warned": "quant_storage",
        "quant": {**NF4, "bnb_4bit_quant_storage": "uint8"},
        "ds": ZERO3,
        "ds_alone": "the JSON is right by itself",
        "lf": "bitsandbytes, which it needs for this, does not come with it",
        "ax": {"load_in_4bit": True, "adapter": "qlora"},
    },
    {
        "id": "deepspeed-and-fsdp",
        "what": "`deepspeed` and `fsdp` in one run",
        "thread": "peft#1418",
        "kit": ["deepspeed.file={ds}", "fsdp.fsdp_version=2"],
        "rule": ("deepspeed-fsdp", "fsdp"),
        "sft": FSDP,
        "ds": ZERO2,
        "ds_alone": "the JSON is right by itself",
        "lf": "without a GPU it refuses fsdp by itself",
        "ax": {"fsdp_version": 2, "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}},
    },
    {
        "id": "device-map",
        "what": "`device_map: auto` under ZeRO-3",
        "thread": "transformers#32299, DeepSpeed#5617",
        "kit": ["deepspeed.file={ds}", "trainer.model_init_kwargs={{device_map: auto}}"],
        "rule": ("device-map", "model_init_kwargs"),
        "warned": "device_map",
        "init": {"device_map": "auto"},
        "ds": ZERO3,
        "ds_alone": "the JSON is right by itself",
        "lf": "it has no such key",
        "ax": {"device_map": "auto"},
    },
    {
        "id": "target-modules",
        "what": "`target_modules` of another architecture (`c_attn` on a Llama)",
        "thread": "trl#6168",
        "kit": ["peft.target_modules=[c_attn]"],
        "rule": ("targets-match", "peft.target_modules"),
        "peft": {"target_modules": ["c_attn"]},
        "lf": {"lora_target": "c_attn"},
        "ax": {"lora_target_modules": ["c_attn"]},
    },
    {
        "id": "lora-on-tied-head",
        "what": "LoRA on `lm_head` of a model with tied embeddings",
        "thread": "transformers#45127, peft#2777",
        "model": "tied",
        "kit": ["peft.target_modules=[q_proj,lm_head]"],
        "rule": ("lm-head-target", "peft.target_modules"),
        "warned": "tie_word_embeddings|tied",
        "peft": {"target_modules": ["q_proj", "lm_head"]},
        "lf": {"lora_target": "q_proj,lm_head"},
        "ax": {"lora_target_modules": ["q_proj", "lm_head"]},
    },
    {
        "id": "tokens-without-rows",
        "what": "tokens added to the tokenizer, no rows for them in the embeddings",
        "thread": "peft#2777, unsloth#9331",
        "model": "tokens",
        "data": "calls",
        "kit": [],
        "rule": ("vocabulary", "tokenizer"),
        "warned": "resiz",
    },
    {
        "id": "adapter-of-another-base",
        "what": "training goes on from an adapter of another base",
        "thread": "unsloth-zoo#810, LlamaFactory#6105",
        "kit": ["peft.init_from={adapter}", "peft.r=4", "peft.lora_alpha=8", "peft.target_modules=[q_proj]"],
        "rule": ("init-from-base", "peft.init_from"),
        "adapter": True,
        "lf": {"adapter_name_or_path": "{adapter}"},
        "ax": {"lora_model_dir": "{adapter}"},
    },
    {
        "id": "no-pad-token",
        "what": "a tokenizer without a padding token",
        "thread": "trl#1623, unsloth#416",
        "model": "nopad",
        "kit": [],
        "rule": ("special-token-missing", "tokenizer.pad_token"),
        "warned": "pad.?token",
    },
    {
        "id": "no-chat-template",
        "what": "chats, and a tokenizer without a chat template",
        "thread": "LlamaFactory#5186, #10596",
        "model": "notemplate",
        "kit": [],
        "rule": ("chat-template", "chat_template"),
        "lf": OWN,
        "ax": {"chat_template": "tokenizer_default"},
    },
    {
        "id": "no-generation-marks",
        "what": "`assistant_only_loss`, and a template without generation marks",
        "thread": "trl#4147, #3927, #4879",
        "model": "nomarks",
        "kit": ["trainer.assistant_only_loss=true"],
        "rule": None,  # none any more: where the answers stand is derived from the template, and verified on every row
        "sft": {"assistant_only_loss": True},
        "lf": ANSWERS,
        "ax": ANSWERS,
    },
    {
        "id": "packing-wrapped",
        "what": "packing that lets samples see each other (`wrapped`)",
        "thread": "trl#1230, #3067, #3910",
        "kit": ["trainer.packing=true", "trainer.packing_strategy=wrapped"],
        "rule": ("packing-wrapped", "packing"),
        "warned": "decontamination|contaminat|packing",
        "sft": {"packing": True, "packing_strategy": "wrapped"},
        "lf": {"packing": True},
        "ax": "its packing keeps samples apart with every attention that it knows",
    },
    {
        "id": "missing-column",
        "what": "the data has a column `body` in place of `text` or `messages`",
        "thread": "dspy#9361",
        "data": "body",
        "kit": [],
        "rule": ("dataset-columns", "dataset.columns"),
    },
    {
        "id": "renamed-argument",
        "what": "an argument of last year (`max_seq_length`)",
        "thread": "trl#6168, unsloth#10785",
        "kit": ["trainer.max_seq_length=64"],
        "rule": ("renamed-key", "trainer.max_seq_length"),
        "warned": "max_seq_length",
        "sft": {"max_seq_length": 64},
        "lf": {"max_seq_length": 64},
        "ax": {"max_seq_length": 64},
    },
    {
        "id": "best-model",
        "what": "`load_best_model_at_end` with `eval_strategy` steps and `save_strategy` epoch",
        "thread": "transformers#35850",
        "kit": ["trainer.load_best_model_at_end=true", "trainer.eval_strategy=steps", "trainer.eval_steps=1",
                "trainer.save_strategy=epoch", "dataset.test_size=4"],
        "rule": ("best-model", "load_best_model_at_end"),
        "warned": "load_best_model",
        "sft": {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "epoch"},
        "eval": True,
        "lf": {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "epoch",
               "val_size": 0.2},
        "ax": {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "epoch",
               "val_set_size": 0.2},
    },
    {
        "id": "two-precisions",
        "what": "`fp16` and `bf16` both true",
        "thread": "apps#9",
        "kit": ["trainer.fp16=true", "trainer.bf16=true"],
        "rule": ("fp16-bf16", "trainer.fp16"),
        "sft": {"fp16": True, "bf16": True},
        "lf": {"fp16": True, "bf16": True},
        "ax": "without a GPU it refuses bf16 by itself",
    },
]  # fmt: skip


EVAL = {"eval_strategy": "steps", "eval_steps": 2}
KIT_EVAL = ["trainer.eval_strategy=steps", "trainer.eval_steps=2", "dataset.test_size=4"]
SAVE = {"save_strategy": "steps", "save_steps": 2}
# What other people's reports say goes wrong silently, late, or at a resume. `env`: variables of the process. `resume`:
# what happens between a run's checkpoint after 2 of 4 steps and its resume; `change` there is a function below.
FAULTS: list[dict[str, Any]] = [
    {
        "id": "resume-weights-alone",
        "what": "`save_only_model`, stopped after 2 steps and resumed",
        "thread": "LLaMA-Factory#5711",
        "kit": ["trainer.save_only_model=true"],
        "sft": {"save_only_model": True, **SAVE},
        "resume": "nothing",
    },
    {
        "id": "resume-other-data",
        "what": "half of the data file is cut off between stop and resume",
        "thread": "LLaMA-Factory#7085",
        "kit": [],
        "sft": SAVE,
        "resume": "cut_data",
    },
    {
        "id": "resume-other-base",
        "what": "a weight of the base is another between stop and resume",
        "thread": "LLaMA-Factory#7085",
        "kit": [],
        "sft": SAVE,
        "resume": "change_base",
    },
    {
        "id": "resume-other-template",
        "what": "the chat template is another between stop and resume",
        "thread": "LLaMA-Factory#7085",
        "kit": [],
        "sft": SAVE,
        "resume": "change_template",
    },
    {
        "id": "worst-as-best",
        "what": "`greater_is_better=true` with eval_loss: the worst checkpoint is published as the best",
        "thread": "transformers#31142",
        "kit": ["trainer.load_best_model_at_end=true", "trainer.metric_for_best_model=eval_loss",
                "trainer.greater_is_better=true", "trainer.save_steps=2", *KIT_EVAL],
        "rule": ("metric-direction", "greater_is_better"),
        "sft": {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
                **SAVE, **EVAL},
        "eval": True,
    },
    {
        "id": "two-schedules",
        "what": "a scheduler in the JSON, and `lr_scheduler_type` typed beside it",
        "thread": "LLaMA-Factory#394",
        "kit": ["deepspeed.file={ds}", "trainer.lr_scheduler_type=linear"],
        "rule": ("scheduler", "lr_scheduler_type"),
        "sft": {"lr_scheduler_type": "linear"},
        "ds": {**ZERO2, "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 2}}},
    },
    {
        "id": "precision-from-outside",
        "what": "`ACCELERATE_MIXED_PRECISION=bf16` in the environment of a float32 run",
        "thread": "transformers#29510",
        "kit": [],
        "env": {"ACCELERATE_MIXED_PRECISION": "bf16"},
        "runs": "cleared ACCELERATE_MIXED_PRECISION",
    },
    {
        "id": "no-step",
        "what": "`num_train_epochs=-1`",
        "thread": "transformers",
        "kit": ["trainer.num_train_epochs=-1", "trainer.max_steps=-1"],
        "rule": ("no-steps", "num_train_epochs"),
        "sft": {"num_train_epochs": -1, "max_steps": -1},
    },
    {
        "id": "steps-and-epochs",
        "what": "`max_steps` and `num_train_epochs` both typed",
        "thread": "transformers",
        "kit": ["trainer.num_train_epochs=3", "trainer.max_steps=4"],
        "rule": ("steps-and-epochs", "num_train_epochs"),
        "warned": "epochs",
        "sft": {"num_train_epochs": 3, "max_steps": 4},
    },
    {
        "id": "dropped-target",
        "what": "`embed_tokens` as target beside `layers_to_transform`",
        "thread": "peft#1024",
        "kit": ["peft.target_modules=[q_proj,embed_tokens]", "peft.layers_to_transform=[0]"],
        "rule": ("layers-drop-target", "embed_tokens"),
        "warned": "embed_tokens",
        "peft": {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [0]},
    },
    {
        "id": "eva-without-data",
        "what": "`init_lora_weights=eva`, and nobody computes it",
        "thread": "peft, EVA",
        "kit": ["peft.init_lora_weights=eva"],
        "rule": ("unprepared", "eva"),
        "warned": "eva",
        "peft": {"init_lora_weights": "eva"},
    },
    {
        "id": "gptq-full",
        "what": "full fine-tuning of a base that is stored as GPTQ",
        "thread": "transformers",
        "kit": ["peft=none"],
        "rule": ("stored-quantized", "gptq"),
        "model": "gptq",
        "full": True,
    },
    {
        "id": "min-lr-missing",
        "what": "`cosine_with_min_lr` without a minimum",
        "thread": "transformers optimization",
        "kit": ["trainer.lr_scheduler_type=cosine_with_min_lr"],
        "rule": ("scheduler-kwargs", "min_lr"),
        "sft": {"lr_scheduler_type": "cosine_with_min_lr"},
    },
    {
        "id": "scheduler-typo",
        "what": "`lr_scheduler_kwargs: {num_cycle: 2}`",
        "thread": "transformers optimization",
        "kit": ["trainer.lr_scheduler_kwargs={{num_cycle: 2}}"],
        "rule": ("scheduler-kwargs", "num_cycle"),
        "sft": {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycle": 2}},
    },
    {
        "id": "metric-unknown",
        "what": "`metric_for_best_model=eval_accuracy` without compute_metrics",
        "thread": "transformers Trainer",
        "kit": ["trainer.load_best_model_at_end=true", "trainer.metric_for_best_model=eval_accuracy",
                "trainer.save_steps=2", *KIT_EVAL],
        "rule": ("metric-name", "eval_accuracy"),
        "sft": {"load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy", **SAVE, **EVAL},
        "eval": True,
    },
    {
        "id": "drop-last",
        "what": "`dataloader_drop_last` with a batch larger than the data",
        "thread": "transformers Trainer",
        "kit": ["trainer.dataloader_drop_last=true", "trainer.per_device_train_batch_size=64"],
        "rule": ("drop-last", "dataloader_drop_last"),
        "sft": {"dataloader_drop_last": True, "per_device_train_batch_size": 64},
    },
    {
        "id": "optimizer-absent",
        "what": "`optim=galore_adamw` without its package",
        "thread": "transformers trainer_optimizer",
        "kit": ["trainer.optim=galore_adamw", "trainer.optim_target_modules=[q_proj]"],
        "rule": ("packages", "galore"),
        "sft": {"optim": "galore_adamw", "optim_target_modules": ["q_proj"]},
    },
    {
        "id": "head-by-regex",
        "what": "`target_modules` as an expression that reaches lm_head",
        "thread": "trl sft_trainer",
        "kit": ["peft.target_modules='.*(q_proj|head)'"],
        "rule": ("lm-head-target", "lm_head"),
        "peft": {"target_modules": ".*(q_proj|head)"},
    },
    {
        "id": "alpha-zero",
        "what": "`lora_alpha=0`: the adapter changes nothing",
        "thread": "peft LoraConfig",
        "kit": ["peft.lora_alpha=0"],
        "rule": ("range", "lora_alpha"),
        "peft": {"lora_alpha": 0},
    },
]  # fmt: skip


# ---- what happens between a stop and a resume ----


def nothing(base: Path, data: Path) -> None:
    pass


def cut_data(base: Path, data: Path) -> None:
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(lines[: len(lines) // 2]))


def change_base(base: Path, data: Path) -> None:
    file = base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 64
    file.write_bytes(content)


def change_template(base: Path, data: Path) -> None:
    file = base / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|user|>", "<|system|>") + "\n")


CHANGES = {f.__name__: f for f in (nothing, cut_data, change_base, change_template)}


def make_world(folder: Path, base: Path, cases: list[dict[str, Any]]) -> dict[str, Path]:
    """Names to paths: variants of `base`, data files, an adapter of a base with other shapes, each case's JSON."""
    import tiny

    world = {"base": base}
    for name in ("tied", "nopad", "notemplate", "nomarks", "tokens"):
        world[name] = Path(shutil.copytree(base, folder / name, dirs_exist_ok=True))
    tokenizer_json(world["nopad"], pad_token=None)
    config = json.loads((world["nopad"] / "config.json").read_text())
    write(world["nopad"] / "config.json", {**config, "pad_token_id": None})
    (world["notemplate"] / "chat_template.jinja").unlink()
    marks = tiny.TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (world["nomarks"] / "chat_template.jinja").write_text(marks)
    add_tokens(world["tokens"], 30)
    shutil.rmtree(world["tied"])
    tiny.make_model(world["tied"], tied=True)
    world["chat"] = write_rows(folder / "chat.jsonl", tiny.chat_rows(24))
    world["text"] = write_rows(folder / "text.jsonl", tiny.text_rows(24))
    calls = [
        {"messages": [{"role": "user", "content": "call help"}, {"role": "assistant", "content": f"<call{i}> yes"}]}
        for i in range(24)
    ]
    world["calls"] = write_rows(folder / "calls.jsonl", calls)
    world["body"] = write_rows(folder / "body.jsonl", [{"body": r["text"]} for r in tiny.text_rows(24)])
    world["gptq"] = Path(shutil.copytree(base, folder / "gptq", dirs_exist_ok=True))
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    config = json.loads((world["gptq"] / "config.json").read_text())
    write(world["gptq"] / "config.json", {**config, "quantization_config": stored})
    world["adapter"] = make_adapter(folder / "adapter", folder / "wide")
    for case in cases:
        if "ds" in case:
            world[f"ds {case['id']}"] = write(folder / f"{case['id']}.json", case["ds"])
    return world


def make_adapter(folder: Path, wide: Path) -> Path:
    """A LoRA adapter of a base twice as wide."""
    import tiny
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    tiny.make_model(wide, hidden_size=64)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(wide), lora).save_pretrained(folder)
    return folder


def add_tokens(folder: Path, count: int) -> None:
    """What `tokenizer.add_tokens` and `save_pretrained` leave behind where the model was not resized."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<call{i}>" for i in range(count)])
    tokenizer.save_pretrained(folder)


def tokenizer_json(folder: Path, **changes: Any) -> None:
    file = folder / "tokenizer_config.json"
    config = {**json.loads(file.read_text()), **changes}
    write(file, {k: v for k, v in config.items() if v is not None})


def write(path: Path, tree: Any) -> Path:
    path.write_text(json.dumps(tree, indent=1))
    return path


def overrides(case: dict[str, Any], world: dict[str, Path]) -> list[str]:
    """The case's command line for `kit check`."""
    names = {"ds": world.get(f"ds {case['id']}"), "adapter": world["adapter"]}
    given = [
        f"model.name_or_path={world[case.get('model', 'base')]}",
        f"dataset.path={world[case.get('data', 'chat')]}",
        "trainer.use_cpu=true",
    ]
    return [*given, *(o.format(**names) for o in case["kit"])]
