"""What the pinned libraries do by themselves where a rule speaks: an error after loading, silence, or other training.

Each row of LIBRARIES shows one rule to be needed, and fails when a release of theirs makes it superfluous. ELSEWHERE
says why a rule has no row here.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kit.config.rules.table import RULES


def llama(**config: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, bos_token_id=1, eos_token_id=2)  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**shape, **config}))


def arguments(**values: Any) -> Any:
    from trl import SFTConfig

    return SFTConfig(**{"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": [], **values})


def adapted(model: Any = None, **values: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model or llama(), LoraConfig(**{"target_modules": ["q_proj"], **values}))


def trained(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def raises(kind: type[Exception], word: str) -> Callable[[Callable[[], Any]], None]:
    def see(act: Callable[[], Any]) -> None:
        with pytest.raises(kind, match=word):
            act()

    return see


def silent(holds: Callable[[Any], bool]) -> Callable[[Callable[[], Any]], None]:
    """Nothing is raised, and the outcome is not what was asked for."""

    def see(act: Callable[[], Any]) -> None:
        assert holds(act())

    return see


def refuses(word: str = "") -> Callable[[Callable[[], Any]], None]:
    return raises(ValueError, word)


# ---- what is acted out ----


def trainer(tmp_path: Path | None = None, rows: Any = None, eval_rows: Any = None, peft: Any = None, **values: Any):
    """An SFTTrainer on rows that are tokens already: what TRL and transformers say when it is built."""
    from datasets import Dataset
    from trl import SFTTrainer

    rows = Dataset.from_list([{"input_ids": [1, 5, 6, 2], "labels": [1, 5, 6, 2]}] * 4) if rows is None else rows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SFTTrainer(llama(), arguments(**values), train_dataset=rows, eval_dataset=eval_rows, peft_config=peft,
                          processing_class=tokenizer())  # fmt: skip


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "<pad>", "a"])}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def lora(**values: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"target_modules": ["q_proj"], **values})


def stream() -> Any:
    from datasets import IterableDataset

    return IterableDataset.from_generator(lambda: iter([{"input_ids": [1, 5], "labels": [1, 5]}]))


def chats() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"text": "a a"}] * 4)


def warmed(warmup: int, steps: int, kind: str = "cosine") -> list[float]:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 1.0)
    schedule = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def gpt2_beyond() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config)(torch.zeros(1, 20, dtype=torch.long))


def tied_saved() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(llama(tie_word_embeddings=True), modules_to_save=["lm_head"]).merge_and_unload()
    return model.config.tie_word_embeddings


def tied_target() -> bool:
    """Whether a merge of LoRA on the input side changes the output side as well."""
    base = llama(tie_word_embeddings=True)
    before = base.lm_head.weight.detach().clone()
    model = adapted(base, target_modules=["embed_tokens"])
    for name, parameter in model.named_parameters():
        if "lora_embedding" in name:
            nn.init.ones_(parameter)
    return not torch.equal(model.merge_and_unload().lm_head.weight, before)


def wrapped_apart() -> float:
    """How far a document's logits move when another one is joined in front of it, as "wrapped" does."""
    model = llama().eval()
    first, second = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 10]])
    with torch.no_grad():
        joined = model(torch.cat([first, second], 1), use_cache=False).logits[:, 3:]
        return float((joined - model(second, use_cache=False).logits).abs().max())


def deepspeed_zero(**values: Any) -> Any:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return DeepSpeedZeroConfig(**values)


def deepspeed_clipping(**values: Any) -> Any:
    """What DeepSpeed itself reads of a JSON's top level."""
    from deepspeed.runtime.config import get_gradient_clipping

    return get_gradient_clipping(values)


def quantized(**values: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**values)


def peft_of(kind: str, model: Any = None, **values: Any) -> Any:
    from peft import get_peft_config, get_peft_model

    return get_peft_model(model or llama(), get_peft_config({"peft_type": kind, "task_type": "CAUSAL_LM", **values}))


def checkpointed() -> Any:
    model = llama()
    with contextlib.suppress(AttributeError):
        model.gradient_checkpointing_enable()
    return model


def mixed_dtypes() -> bool:
    """DeepSpeed casts floats by number: bits packed in a float16 tensor do not survive it."""
    packed = torch.arange(1, 30000, 7, dtype=torch.int16).view(torch.float16)
    return torch.equal(packed.to(torch.bfloat16).to(torch.float16).view(torch.int16), packed.view(torch.int16))


def accelerator(**values: Any) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True, **values)


def positions(**rope: Any) -> Any:
    return llama(max_position_embeddings=16, **rope)(torch.zeros(1, 40, dtype=torch.long)).logits


def leaf_classes() -> list[str]:
    return deepspeed_zero(stage=3).leaf_module.classes


def evaluated(**values: Any) -> Any:
    """One evaluation as a run makes it, which looks for the metric."""
    from datasets import Dataset

    rows = Dataset.from_list([{"input_ids": [1, 5, 6, 2], "labels": [1, 5, 6, 2]}] * 4)
    built = trainer(eval_rows=rows, eval_strategy="steps", **values)
    return built._determine_best_metric(built.evaluate(), None)


def scheduled(kind: str, **kwargs: Any) -> Any:
    from transformers import get_scheduler

    return get_scheduler(kind, torch.optim.SGD(nn.Linear(2, 2).parameters(), 1.0), 0, 9, kwargs)


def optimizer(name: str, **values: Any) -> Any:
    built = trainer(optim=name, **values)
    return built.create_optimizer()


def decayed(decay: float, rate: float = 1e-4) -> float:
    """What AdamW leaves of a weight in a step without a gradient."""
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.zeros(1)
    torch.optim.AdamW([weight], lr=rate, weight_decay=decay).step()
    return weight.item()


KW = "gradient_checkpointing_kwargs"
LIBRARIES: dict[str, tuple[Callable[[], Any], Callable[[Callable[[], Any]], None]]] = {
    "unknown-key": (lambda: deepspeed_clipping(gradient_cliping=0.3), silent(lambda clip: clip == 1.0)),
    "renamed-key": (lambda: arguments(max_seq_length=5), raises(TypeError, "max_seq_length")),
    "removed-key": (lambda: arguments(warmup_ratio=0.1), raises(TypeError, "warmup_ratio")),
    "kind": (lambda: arguments(weight_decay="much").weight_decay, silent(lambda value: value == "much")),
    "range": (lambda: deepspeed_zero(stage=2, reduce_bucket_size=0.5), refuses("reduce_bucket_size")),
    "choice": (lambda: arguments(optim="adamm"), refuses("adamm")),
    "peft-type": (lambda: peft_of("LORRA"), raises(KeyError, "LORRA")),
    "zero-block": (lambda: deepspeed_zero(True), raises(TypeError, "positional")),
    "deepspeed": (lambda: deepspeed_zero(stage=2, offload_param={"device": "cpu"}).stage, silent(lambda s: s == 2)),
    "hidden-size": (lambda: deepspeed_zero(stage=3, reduce_bucket_size="auto").reduce_bucket_size,
                    silent(lambda size: size == 5e8)),
    "fp16-bf16": (lambda: arguments(fp16=True, bf16=True), refuses("fp16 and bf16")),
    "full-eval": (lambda: arguments(fp16_full_eval=True, bf16_full_eval=True), refuses("full eval")),
    "tf32-cpu": (lambda: arguments(tf32=True), refuses("tf32")),
    "fsdp-alone": (lambda: trainer(fsdp=True, fsdp_config={}), refuses("distributed training")),
    "length-learned": (gpt2_beyond, raises(IndexError, "")),
    "length-uncut": (gpt2_beyond, raises(IndexError, "")),
    "length-range": (positions, silent(lambda logits: logits.shape[1] == 40)),
    "moe-leaf": (leaf_classes, silent(lambda held: not any("olmoe" in c for c in held) and len(held) == 3)),
    "attention-name": (lambda: llama(attn_implementation="flash"), refuses("flash")),
    "attention-precision": (lambda: llama(attn_implementation="flash_attention_2"), raises(ImportError, "Flash")),
    "packing-wrapped": (wrapped_apart, silent(lambda moved: moved > 1e-3)),
    "lm-head-target": (lambda: trainer(peft=lora(target_modules=["lm_head"])), refuses("lm_head")),
    "target-expression": (lambda: adapted(target_modules="(q_proj"), raises(re.error, "")),
    "parameters-match": (lambda: trained(adapted(target_parameters=["experts.gate_up"])),
                         silent(lambda names: names and not any("gate_up" in n for n in names))),
    "peft-nothing": (lambda: adapted(target_modules=[]), refuses("target_modules")),
    "peft-sizes": (lambda: peft_of("C3A", target_modules=["q_proj"]), refuses("block size")),
    "metric-name": (lambda: evaluated(metric_for_best_model="accuracy"), raises(KeyError, "eval_accuracy")),
    "metric-direction": (lambda: arguments(metric_for_best_model="perplexity").greater_is_better, silent(bool)),
    "scheduler-kwargs": (lambda: scheduled("cosine_with_min_lr"), refuses("min_lr")),
    "optimizer-args": (lambda: optimizer("sgd", optim_args="momentun=0.9").defaults["momentum"],
                       silent(lambda momentum: momentum == 0)),
    "optimizer-targets": (lambda: optimizer("sgd", optim_target_modules=["nothing"]), silent(bool)),
    "packages": (lambda: optimizer("adamw_torch_4bit"), raises(ImportError, "torchao")),
    "step-size": (lambda: decayed(1e4), silent(lambda weight: weight == 0)),
    "drop-last": (lambda: len(trainer(dataloader_drop_last=True).get_train_dataloader()), silent(lambda n: n == 0)),
    "offload-cpu": (lambda: trainer(activation_offloading=True), raises(AttributeError, "type")),
    "router-loss": (lambda: trainer(router_aux_loss_coef=0.01), refuses("router_aux_loss_coef")),
    "eval-off": (lambda: arguments(eval_strategy="steps", do_eval=False).do_eval, silent(bool)),
    "targets-match": (lambda: trained(adapted(target_modules=["q_proj", "v_prj"])),
                      silent(lambda names: names and not any("v_pr" in n for n in names))),
    "experts-missed": (lambda: trained(adapted(target_modules=["q_proj", "gate_up"])),
                       silent(lambda names: names and not any("gate_up" in n for n in names))),
    "patterns-match": (lambda: adapted(rank_pattern={"q_prj": 4}).base_model.model.model.layers[0].self_attn.q_proj.r,
                       silent(lambda r: r["default"] == 8)),
    "saved-match": (lambda: trained(adapted(modules_to_save=["embed_tokes"])),
                    silent(lambda names: all("lora" in n for n in names))),
    "layers-range": (lambda: trained(adapted(layers_to_transform=[0, 7])), silent(lambda names: len(names) == 2)),
    "tied-target": (tied_target, silent(bool)),
    "tied-saved": (tied_saved, silent(lambda tied: tied is False)),
    "prefix-checkpointing": (lambda: peft_of("PREFIX_TUNING", checkpointed(), num_virtual_tokens=3),
                             refuses("gradient checkpointing")),
    "best-model": (lambda: arguments(load_best_model_at_end=True), refuses("load_best_model_at_end")),
    "best-steps": (lambda: arguments(load_best_model_at_end=True, eval_strategy="steps", eval_steps=3, save_steps=4),
                   refuses("round multiple")),
    "best-metric": (lambda: trainer(save_strategy="best"), refuses("metric_for_best_model")),
    "eval-data": (lambda: trainer(eval_strategy="steps", eval_steps=1), refuses("eval_dataset")),
    "eval-batch": (lambda: arguments(per_device_train_batch_size=1).per_device_eval_batch_size,
                   silent(lambda rows: rows == 8)),
    "eval-schedule": (lambda: arguments(lr_scheduler_type="reduce_lr_on_plateau"), refuses("eval strategy")),
    "warmup-longer": (lambda: max(warmed(100, 50)), silent(lambda top: top < 0.5)),
    "warmup-half": (lambda: sum(r < 1 for r in warmed(100, 200)[:100]), silent(lambda below: below == 100)),
    "warmup-constant": (lambda: warmed(10, 20, "constant")[0], silent(lambda rate: rate == 1.0)),
    "step-counts": (lambda: arguments(logging_steps=1.5), refuses("logging_steps")),
    "prefetch": (lambda: arguments(dataloader_prefetch_factor=2), refuses("prefetch")),
    "empty-cache": (lambda: arguments(torch_empty_cache_steps=0), refuses("torch_empty_cache_steps")),
    "parallelism": (lambda: accelerator(parallelism_config={"tp_size": 2}), raises(AttributeError, "dict")),
    "stream-length": (lambda: trainer(rows=stream()), refuses("max_steps")),
    "stream-split": (lambda: stream().train_test_split(0.1), raises(AttributeError, "train_test_split")),
    "packing-length": (lambda: trainer(packing=True, max_length=None), refuses("max_length")),
    "padding-free": (lambda: trainer(padding_free=True), refuses("padding_free")),
    "loss-mask-format": (lambda: trainer(rows=chats(), assistant_only_loss=True), refuses("not conversational")),
    "neftune": (lambda: torch.zeros(2).uniform_(5, -5), raises(RuntimeError, "uniform_")),
    "checkpointing-names": (lambda: arguments(gradient_checkpointing=True, activation_checkpointing=False),
                            silent(lambda args: args.gradient_checkpointing is False)),
    "selective-checkpointing": (lambda: trainer(gradient_checkpointing=False, **{KW: {"selective": True}}),
                                refuses("selective")),
    "every-n-layers": (lambda: llama().activation_checkpointing_enable(every_n_layers=0),
                       raises(ZeroDivisionError, "modulo|zero")),
    "quantized-bits": (lambda: quantized(load_in_4bit=True, load_in_8bit=True), refuses("load_in_4bit")),
    "quantized-defaults": (lambda: quantized(load_in_4bit=True),
                           silent(lambda q: (q.bnb_4bit_quant_type, q.bnb_4bit_compute_dtype)
                                  == ("fp4", torch.float32))),
    "quantized-storage": (mixed_dtypes, silent(lambda same: same is False)),
    "tracker-missing": (lambda: trainer(report_to=["comet_ml"]), raises(RuntimeError, "comet")),
}  # fmt: skip
ELSEWHERE = {
    "the kit's own words and files: no library reads them": """override group-choice run-file data-word missing
        missing-key type section owned path script count batch peft-none dataset-files dataset-rows dataset-unreadable
        dataset-columns dataset-format dataset-template dataset-configuration dataset-split held-out bad-rows
        environment-variable remote-code hostfile hostfile-unread node-rank quantized-random quantized-init-kwargs
        tracker-all tracker-online full-learning-rate eval-never requeue-weights resume-weights batch-beyond-data""",
    "of the Hub: shown against a server of its own by tests/test_fetch.py": "hub offline model-folder",
    "shown beside the files by tests/test_cli_check.py": "model-files deepspeed-file",
    "shown beside the installed DeepSpeed by tests/config/test_deepspeed_file.py": "auto doubled literal",
    "shown by tests/config/test_architectures.py": "architecture",
    "shown beside the installed classes by tests/config/test_tokenizer.py": """tokenizer-files chat-template
        chat-template-name special-token special-token-missing vocabulary added-tokens token-indices-tied""",
    "shown by tests/config/test_init_from.py and tests/training/test_warm_start.py": """init-from init-from-files
        init-from-base""",
    "raised by an engine in a launch; compared with the installed DeepSpeed by tests/config/test_zero.py": """mismatch
        optimizer offload-optimizer scheduler deepspeed-fsdp find-batch-size autotp-experts autotp-heads reentrant
        token-indices-zero3 ddp-backend quantized-int8-sharded quantized-offload-param""",
    "needs GPUs": """fsdp-cpu fsdp-checkpointing fp16-cpu bf16-hardware gpus-missing local-one-process device-map
        quantized-gpu-memory quantized-cpu-offload""",
    "about time, memory or ports of a machine": "bf16-slow-cpu port-taken host-memory",
    "about what sbatch reads; the scripts are run by tests/test_slurm.py": "slurm-value slurm-extra slurm-gpus",
    "about a package that is not there": "stored-package optimizer-layout",
    "shown beside the installed classes by tests/config/test_effect.py": """unprepared no-effect no-steps
        steps-and-epochs split-batches batch-varies layers-drop-target stored-quantized""",
    "asks the Hub": "hub-push",
    "needs a quantized base; tried by tests/launch/test_quantized.py and tests/test_merge_quantized.py": """
        quantized-full quantized-peft quantized-head quantized-saved-module quantized-lora-bias quantized-int8-main
        quantized-stored bitsandbytes""",
    "read in transformers' source; training apart would take a model of that family": "packing-recurrent",
    "says what cannot have an effect": "sampling",
    "needs liger-kernel, which is not among the pinned packages": "liger-loss",
}


def test_every_rule_has_a_row_or_a_reason():
    listed = [id for ids in ELSEWHERE.values() for id in ids.split()]
    assert len(listed) == len(set(listed)) and not set(listed) & set(LIBRARIES)
    assert {*listed, *LIBRARIES} == {rule.id for rule in RULES}


@pytest.mark.parametrize("id", LIBRARIES)
def test_the_libraries_by_themselves(id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    act, see = LIBRARIES[id]
    see(act)
