"""The table of rules: each is told, each fires where it should and is silent where it should be, none is missing."""

from __future__ import annotations

import ast
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from soak import VALID, make_inputs, mutations

from kit import api
from kit.cli import verbs as cli
from kit.config.report import Report
from kit.config.rules import explain, table
from kit.config.rules.context import RuleContext
from kit.config.rules.table import CHECKS, RULES
from kit.errors import DONE, REFUSED, KitError
from kit.inspection.model import Base
from kit.schema.run_plan import RunInput
from kit.system import hardware
from kit.system.hardware import Gpu

IDS = {rule.id for rule in RULES}
ROOT = Path(__file__).parents[2]


# ---- the table itself ----


def test_every_rule_is_explained():
    assert len(IDS) == len(RULES) and set(explain.explanations()) == IDS
    for rule in RULES:
        words = explain.explanations()[rule.id]
        sentences = re.findall(r"[.?!](?= |$)", words["explanation"].strip())
        assert 2 <= len(sentences) <= 7 and len(words["explanation"].split()) >= 9, rule.id
        assert words["summary"] and not words["summary"].endswith(".") and len(words["summary"]) < 90, rule.id
        assert rule.source and (rule.check is None) == bool(rule.reported_by), rule.id


def test_keys_of_rules_are_keys_of_a_run():
    from kit.schema import fields

    for rule in CHECKS:
        assert rule.keys, rule.id
    tables = {"trainer": "SFTConfig", "peft": "LORA", "quantization": "BitsAndBytesConfig", "deepspeed": "deepspeed"}
    for rule in RULES:
        for key in rule.keys:
            section, _, rest = key.partition(".")
            assert section in RunInput.model_fields, key
            first = rest.partition(".")[0]
            own = first in ("init_from", "init_from_pickle", "peft_type", "file") or section == "fsdp"
            if section in tables and first and not own:
                assert first in fields.field_tables()[tables[section]], key


def test_the_command(capsys: pytest.CaptureFixture[str]):
    assert cli.run_verb(["check", "--rules"]) == DONE
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(RULES) and all(re.match(r"\S+ +(refuses|warns) +\S", line) for line in lines)
    assert cli.run_verb(["check", "--explain", "lm-head-target"]) == DONE
    told = capsys.readouterr().out
    assert (
        "modules_to_save=[lm_head]" in told and "peft.target_modules" in told and "trl trainer/sft_trainer.py" in told
    )
    assert cli.run_verb(["check", "--explain", "lm-head-targets"]) == REFUSED
    assert "did you mean lm-head-target" in capsys.readouterr().err


# ---- no refusal without a rule ----


def test_no_problem_is_made_without_a_rule():
    """Every `Problem(...)` and `report.problem(...)` gives a rule as its fourth argument; a literal one is listed."""
    for file in [
        f for room in ("config", "inspection", "schema") for f in sorted((ROOT / "kit" / room).rglob("*.py"))
    ]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", "") or getattr(node.func, "attr", "")
            if name not in ("Problem", "KitError", "problem", "warning"):
                continue
            assert name == "KitError" or node.args[2:3] and getattr(node.args[2], "value", "x") != "", node.lineno
            rules_given = [] if name == "KitError" else node.args[3:4]
            rules_given += [k.value for k in node.keywords if k.arg == "rule"]
            assert rules_given or name == "KitError", f"{file.name}:{node.lineno} names no rule"
            for rule in rules_given:
                if isinstance(rule, ast.Constant):
                    assert rule.value in IDS, f"{file.name}:{node.lineno} {rule.value}"


def test_no_refusal_without_a_fix():
    """Every `KitError(...)` and `Problem(...)` of the package says how to mend it; one made of others keeps theirs."""
    for file in sorted((ROOT / "kit").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            starred = isinstance(node, ast.Call) and any(isinstance(a, ast.Starred) for a in node.args)
            if name not in ("Problem", "KitError") or starred or any(k.arg is None for k in node.keywords):
                continue
            whole = (
                name == "KitError"
                and len(node.args) == 1
                and not any(k.arg in ("where", "fix") for k in node.keywords)
            )
            if whole and not isinstance(node.args[0], ast.Constant | ast.JoinedStr | ast.BinOp):
                continue  # a list of problems
            fix = next((k.value for k in node.keywords if k.arg == "fix"), *node.args[2:3] or [None])
            assert fix is not None and getattr(fix, "value", "x") != "", f"{file.name}:{node.lineno} has no fix"


def test_what_reports_a_rule_exists_and_names_it():
    for rule in RULES:
        if rule.reported_by:
            source = (ROOT / "kit" / f"{rule.reported_by}.py").read_text(encoding="utf-8")
            assert f'"{rule.id}"' in source, rule.id


def test_no_problem_leaves_without_a_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    wrong = [["recipe=nothing"], ["nothing"], ["no.yaml"], ["name=${oc.env:NOT_SET_ANYWHERE}"], ["name='["]]
    seen = set()
    for args in [*wrong, *mutations(12, seed=1, folder=tmp_path)]:
        for problem in api.check(*args):
            assert problem.rule in IDS and problem.fix, (args, problem)
            seen.add(problem.rule)
    assert len(seen) > 5


# ---- each check fires, and only where it should ----

MOE = ["model.name_or_path=some/moe", "model.config={model_type: olmoe, num_experts: 8, hidden_size: 64}"]
GPT2 = ["model=gpt2", "tokenizer.pad_token=null"]
TIED = ["model=llama3_2_1b"]
NF4 = ["quantization=nf4"]
USUAL_SEVEN = ["peft.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"]
GPU = ["launch.num_gpus=2", "trainer.use_cpu=false"]
CPU = ["trainer.use_cpu=true"]
EVAL = ["trainer.eval_strategy=steps", "dataset.test_size=0.2"]
STREAM = ["dataset.streaming=true"]
HERE = {"bf16-hardware", "bf16-slow-cpu", "gpus-missing", "port-taken", "host-memory", "quantized-gpu-memory",
        "bitsandbytes", "tracker-missing", "stored-package", "packages", "hub-push"}  # fmt: skip
BEST = [*EVAL, "trainer.load_best_model_at_end=true"]
FIRES: dict[str, list[str]] = {
    "deepspeed-fsdp": ["deepspeed=zero2", "fsdp.fsdp_version=2", *GPU],
    "fsdp-cpu": ["fsdp.fsdp_version=2", *CPU],
    "fsdp-alone": ["fsdp.fsdp_version=2", "trainer.use_cpu=false", "launch.num_gpus=1"],
    "fsdp-checkpointing": ["fsdp.activation_checkpointing=true", *GPU],
    "fp16-bf16": ["trainer.fp16=true", "trainer.bf16=true"],
    "full-eval": ["trainer.fp16_full_eval=true", "trainer.bf16_full_eval=true"],
    "fp16-cpu": ["trainer.fp16=true", *CPU],
    "ddp-backend": ["trainer.ddp_backend=nccl", *CPU],
    "tf32-cpu": ["trainer.tf32=true", *CPU],
    "local-one-process": ["launch=local", "launch.num_gpus=2"],
    "hostfile-unread": ["launch=torchrun", "launch.include=localhost:0", "launch.num_gpus=1"],
    "node-rank": ["launch=torchrun", "launch.num_nodes=2", "launch.node_rank=2"],
    "slurm-value": ["launch=slurm", "launch.slurm.partition='a b'"],
    "slurm-extra": ["launch=slurm", "launch.slurm.extra=['--export=ALL']"],
    "slurm-gpus": ["launch=slurm", "launch.slurm.gres=gpu:4", "launch.num_gpus=2", "trainer.use_cpu=false"],
    "token-indices-zero3": ["deepspeed=zero3", "peft.trainable_token_indices=[1]", *CPU],
    "length-learned": [*GPT2, "trainer.max_length=2048"],
    "length-uncut": ["model=opt_6b7", "trainer.max_length=null"],
    "length-range": ["trainer.max_length=256"],
    "moe-leaf": [*MOE, "deepspeed=zero3", "deepspeed.zero_optimization.leaf_module.classes=[]", *GPU],
    "autotp-experts": [*MOE, "deepspeed=zero1", "deepspeed.tensor_parallel.autotp_size=2"],
    "autotp-heads": ["deepspeed=zero1", "deepspeed.tensor_parallel.autotp_size=4"],
    "attention-name": ["model.attn_implementation=flash"],
    "attention-precision": ["model.attn_implementation=flash_attention_2", *CPU],
    "packing-recurrent": ["model.name_or_path=some/mamba", "model.config.model_type=mamba2", "trainer.packing=true"],
    "lm-head-target": ["peft.target_modules=[q_proj,lm_head]"],
    "experts-missed": ["model=mixtral_8x7b", *USUAL_SEVEN],
    "targets-match": ["peft.target_modules=[q_prj]"],
    "patterns-match": ["peft.rank_pattern={q_prj: 4}"],
    "saved-match": ["peft.modules_to_save=[embed_tokes]"],
    "layers-range": ["peft.layers_to_transform=[0,7]", "peft.target_modules=[q_proj]"],
    "layers-drop-target": ["peft.layers_to_transform=[0]", "peft.target_modules=[q_proj,embed_tokens]"],
    "unprepared": ["peft.init_lora_weights=eva"],
    "no-effect": ["peft.qalora_group_size=8"],
    "no-steps": ["trainer.num_train_epochs=-1"],
    "steps-and-epochs": ["trainer.max_steps=20", "trainer.num_train_epochs=2"],
    "split-batches": ["trainer.accelerator_config={split_batches: true}", "launch=torchrun", "launch.num_gpus=2"],
    "batch-varies": ["trainer.auto_find_batch_size=true"],
    "stored-quantized": [
        "model.name_or_path=some/gptq",
        "peft=none",
        "model.config={model_type: llama, quantization_config: {quant_method: gptq, bits: 4}}",
    ],
    "tied-target": [*TIED, "peft.target_modules=[q_proj,embed_tokens]"],
    "tied-saved": [*TIED, "peft.modules_to_save=[lm_head]"],
    "prefix-checkpointing": ["peft=none", "peft.peft_type=PREFIX_TUNING", "peft.num_virtual_tokens=4"],
    "best-model": ["trainer.load_best_model_at_end=true"],
    "requeue-weights": ["launch=slurm", "trainer.save_only_model=true"],
    "resume-weights": ["trainer.save_only_model=true"],
    "best-steps": [*EVAL, "trainer.load_best_model_at_end=true", "trainer.eval_steps=3", "trainer.save_steps=4"],
    "best-metric": [*EVAL, "trainer.save_strategy=best"],
    "metric-name": [*EVAL, "trainer.metric_for_best_model=eval_accuracy"],
    "metric-direction": [*BEST, "trainer.save_steps=10", "trainer.greater_is_better=true"],
    "scheduler-kwargs": ["trainer.lr_scheduler_type=cosine_with_min_lr"],
    "optimizer-args": ["trainer.optim=sgd", "trainer.optim_args='momentun=0.9'"],
    "optimizer-targets": ["trainer.optim=galore_adamw"],
    "optimizer-layout": ["trainer.optim=lomo", "deepspeed=zero2"],
    "step-size": ["trainer.weight_decay=10000"],
    "batch-beyond-data": ["trainer.gradient_accumulation_steps=100"],
    "drop-last": ["trainer.dataloader_drop_last=true", "trainer.per_device_train_batch_size=97"],
    "offload-cpu": ["trainer.activation_offloading=true", *CPU],
    "router-loss": ["trainer.router_aux_loss_coef=0.01"],
    "eval-off": [*EVAL, "trainer.do_eval=false"],
    "peft-nothing": ["peft.target_modules=[]"],
    "peft-sizes": ["peft=none", "peft.peft_type=C3A", "peft.target_modules=[q_proj]"],  # block_size is 256
    "target-expression": ["peft.target_modules='(q_proj'"],
    "parameters-match": ["peft.target_parameters=[experts.gate_up]"],
    "eval-data": ["trainer.eval_strategy=steps"],
    "eval-never": [*EVAL, "trainer.max_steps=20", "trainer.eval_steps=50"],
    "eval-batch": [*EVAL, "trainer.per_device_train_batch_size=1"],
    "eval-schedule": ["trainer.lr_scheduler_type=reduce_lr_on_plateau"],
    "warmup-longer": ["trainer.max_steps=50", "trainer.warmup_steps=100"],
    "warmup-half": ["trainer.max_steps=200", "trainer.warmup_steps=100"],
    "warmup-constant": ["trainer.lr_scheduler_type=constant", "trainer.warmup_steps=10"],
    "full-learning-rate": ["peft=none"],
    "step-counts": ["trainer.logging_steps=1.5"],
    "prefetch": ["trainer.dataloader_prefetch_factor=2"],
    "empty-cache": ["trainer.torch_empty_cache_steps=0"],
    "find-batch-size": ["deepspeed=zero2", "trainer.auto_find_batch_size=true"],
    "parallelism": ["trainer.parallelism_config={tp_size: 2}"],
    "stream-length": STREAM,
    "stream-split": [*STREAM, "trainer.max_steps=5", "dataset.test_size=0.1"],
    "sampling": ["trainer.packing=true", "trainer.train_sampling_strategy=group_by_length"],
    "packing-wrapped": ["trainer.packing=true", "trainer.packing_strategy=wrapped"],
    "packing-length": ["trainer.packing=true", "trainer.max_length=null"],
    "padding-free": ["trainer.padding_free=true"],
    "loss-mask-format": ["trainer.completion_only_loss=true"],
    "neftune": ["trainer.neftune_noise_alpha=-5"],
    "liger-loss": ["trainer.use_liger_kernel=true", "trainer.liger_kernel_config={fused_linear_cross_entropy: true}"],
    "device-map": ["trainer.model_init_kwargs={device_map: auto}"],
    "checkpointing-names": ["trainer.gradient_checkpointing=true", "trainer.activation_checkpointing=false"],
    "selective-checkpointing": ["deepspeed=zero3", "trainer.gradient_checkpointing_kwargs={selective: true}"],
    "every-n-layers": ["trainer.activation_checkpointing_kwargs={every_n_layers: 0}"],
    "reentrant": ["deepspeed=zero3", "trainer.gradient_checkpointing_kwargs={use_reentrant: false}"],
    "quantized-bits": ["quantization.load_in_4bit=true", "quantization.load_in_8bit=true"],
    "quantized-defaults": ["quantization.load_in_4bit=true"],
    "quantized-full": [*NF4, "peft=none"],
    "quantized-peft": [*NF4, "peft.init_lora_weights=pissa"],
    "quantized-saved-module": [*NF4, "peft.modules_to_save=[q_proj]", "peft.target_modules=[v_proj]"],
    "quantized-head": [*NF4, "quantization.llm_int8_skip_modules=[q_proj]"],
    "quantized-lora-bias": [*NF4, "peft.lora_bias=true"],
    "quantized-int8-sharded": ["quantization=int8", "deepspeed=zero3"],
    "quantized-int8-main": ["quantization=int8", "quantization.llm_int8_has_fp16_weight=true"],
    "quantized-storage": [*NF4, "deepspeed=zero2", "quantization.bnb_4bit_quant_storage=float16", "trainer.bf16=true"],
    "quantized-cpu-offload": ["quantization=int8", "quantization.llm_int8_enable_fp32_cpu_offload=true"],
    "quantized-offload-param": [*NF4, "deepspeed=zero3_offload"],
    "quantized-stored": ["model=llama3_1_8b", "model.config.quantization_config={quant_method: gptq}", *NF4],
    "quantized-random": [*NF4, "model.random_init=true"],
    "quantized-init-kwargs": ["trainer.model_init_kwargs={quantization_config: {load_in_4bit: true}}"],
    "tracker-all": ["trainer.report_to=all"],
    "tracker-online": ["trainer.report_to=comet_ml"],
}


@pytest.fixture
def said(base: Path, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """(rules that refuse, rules that warn) of a run with a valid model and data."""
    monkeypatch.chdir(tmp_path)

    def ask(*overrides: str) -> tuple[set[str], set[str]]:
        own = any(o.startswith(("model=", "model.name_or_path=")) for o in overrides)
        stock = [f"dataset.path={chat}"] if own else [f"dataset.path={chat}", f"model.name_or_path={base}"]
        stock.append("trainer.max_length=128")
        try:
            plan = api.compose(*stock, *overrides)
        except KitError as error:
            return {p.rule for p in error.problems}, set()
        return set(), {w["rule"] for w in plan.warnings}

    return ask


def test_each_check_has_a_case():
    by_facts = {"remote-code"}  # a file has to say it: test_remote_code_in_a_file
    assert set(FIRES) | HERE | by_facts == {rule.id for rule in CHECKS}
    assert {rule.id for rule in CHECKS if rule.on_this_machine} == HERE


@pytest.mark.parametrize("id", FIRES)
def test_fires(id: str, said):
    refused, warned = said(*FIRES[id])
    assert id in (refused if explain.find_rule(id).severity == "refuse" else warned), (refused, warned)


QUIET = [
    [*GPT2, "tokenizer.pad_token='!'", "trainer.max_length=1024"],
    ["model=llama3_1_8b", "trainer.max_length=131072"],
    ["trainer.max_length=512", "model.name_or_path=a/b", "model.config={model_type: llama, hidden_size: 64, "
     "max_position_embeddings: 128, rope_scaling: {rope_type: yarn, factor: 4.0}}"],
    ["model=mixtral_8x7b", "deepspeed=zero3", *GPU],
    [*MOE, "deepspeed=zero3", "deepspeed.zero_optimization.leaf_module.classes=[OlmoeSparseMoeBlock]", *GPU],
    [*MOE, "deepspeed=zero2", *GPU],
    [*MOE, "deepspeed=zero3", *GPU],  # whole decoder layers are leaf modules
    [*TIED, "peft.modules_to_save=[lm_head]", "peft.ensure_weight_tying=true"],
    ["peft.modules_to_save=[norm,embed_tokens,lm_head]"],
    ["peft.rank_pattern={q_proj: 4}", "peft.alpha_pattern={v_proj: 8}"],
    ["model.attn_implementation=kernels-community/flash-attn2", *GPU],
    ["model.attn_implementation=eager"],
    ["trainer.max_steps=100", "trainer.warmup_steps=0.03"],
    ["trainer.max_steps=1", "trainer.warmup_steps=0"],
    ["peft=none", "trainer.learning_rate=1.0e-5"],
    [*EVAL, "trainer.load_best_model_at_end=true", "trainer.eval_steps=2", "trainer.save_steps=4"],
    [*EVAL, "trainer.save_strategy=best", "trainer.metric_for_best_model=loss"],
    [*EVAL, "trainer.per_device_train_batch_size=1", "trainer.per_device_eval_batch_size=8"],
    ["trainer.packing=true"],
    ["trainer.padding_free=true", "trainer.packing=true"],
    ["trainer.padding_free=true", "trainer.max_length=null"],
    [*STREAM, "trainer.max_steps=5"],
    ["trainer.gradient_checkpointing=true", "trainer.gradient_checkpointing_kwargs={selective: true}"],
    ["trainer.activation_checkpointing=false"],
    ["peft=none", "peft.peft_type=PREFIX_TUNING", "peft.num_virtual_tokens=4", "trainer.gradient_checkpointing=false"],
    ["trainer.neftune_noise_alpha=5"],
    [*BEST, "trainer.eval_steps=0.1", "trainer.save_steps=0.2", "trainer.greater_is_better=false"],
    [*BEST, "trainer.save_steps=10", "trainer.metric_for_best_model=eval_mean_token_accuracy"],
    ["trainer.lr_scheduler_type=cosine_with_min_lr", "trainer.lr_scheduler_kwargs={min_lr: 1.0e-6}"],
    ["trainer.lr_scheduler_type=warmup_stable_decay", "trainer.lr_scheduler_kwargs={num_decay_steps: 5}"],
    [*EVAL, "trainer.lr_scheduler_type=reduce_lr_on_plateau", "trainer.lr_scheduler_kwargs={patience: 2}"],
    ["trainer.optim=sgd", "trainer.optim_args='momentum=0.9, nesterov=true'"],
    ["trainer.dataloader_drop_last=true", "trainer.per_device_train_batch_size=96"],
    ["model=mixtral_8x7b", "trainer.router_aux_loss_coef=0.01", "peft.target_modules=[q_proj]"],
    ["model=mixtral_8x7b", "peft.target_parameters=[experts.gate_up_proj]", "peft.target_modules=[q_proj]"],
    ["peft.target_modules='.*q_proj|.*lm_head'", "peft.exclude_modules=[lm_head]"],
    ["peft.target_modules='.*layers.*proj'"],
    *(["peft=none", f"peft.peft_type={kind}", *(f"peft.{s}" for s in settings.split())] for kind, settings in [
        ("BOFT", "target_modules=[q_proj,down_proj] boft_block_size=4 bias=boft_only"),
        ("OFT", "target_modules=[q_proj]"), ("VBLORA", "target_modules=[q_proj,k_proj] vector_length=8"),
        ("C3A", "target_modules=all-linear block_size=16"),
    ]),
    ["peft.layers_to_transform=[0,1]", "peft.target_modules=[q_proj]"],
]  # fmt: skip


# More of the same kinds: what each rule must catch beside its one case above.
ALSO: list[tuple[str, list[str]]] = [
    *(("scheduler-kwargs", [f"trainer.lr_scheduler_type={kind}", f"trainer.lr_scheduler_kwargs={{{kwargs}}}", *EVAL])
      for kind, kwargs in [
          ("linear", "num_cycles: 1"), ("cosine", "num_cycle: 1"), ("cosine", "num_cycles: two"),
          ("cosine_with_restarts", "num_cycles: 0"), ("polynomial", "power: -1"), ("polynomial", "lr_end: 1"),
          ("constant", "power: 1"), ("constant_with_warmup", "num_cycles: 2"), ("inverse_sqrt", "timescale: 0"),
          ("cosine_with_min_lr", "min_lr: 1"), ("cosine_with_min_lr", "min_lr: 0, min_lr_rate: 0.1"),
          ("cosine_warmup_with_min_lr", "warmup_lr_rate: 0.1"), ("cosine_with_min_lr", "warmup_lr_rate: 0.1"),
          ("warmup_stable_decay", "num_stable_steps: 5"), ("warmup_stable_decay", "num_decay_steps: 1.5"),
          ("warmup_stable_decay", "num_decay_steps: 5, decay_type: exp"), ("reduce_lr_on_plateau", "factor: 1.5"),
          ("reduce_lr_on_plateau", "min_lr: [0.1]"), ("reduce_lr_on_plateau", "verbose: true"),
          ("greedy", "factor: 1"), ("greedy", "patience: 5"),  # its min_lr is 1e-3
      ]),
    ("scheduler-kwargs", ["trainer.lr_scheduler_type=warmup_stable_decay", "trainer.max_steps=10",
                          "trainer.lr_scheduler_kwargs={num_decay_steps: 20}"]),
    ("scheduler-kwargs", ["trainer.lr_scheduler_type=polynomial", "trainer.max_steps=10", "trainer.warmup_steps=10"]),
    ("metric-direction", [*EVAL, "trainer.lr_scheduler_type=reduce_lr_on_plateau",
                          "trainer.lr_scheduler_kwargs={mode: max}"]),
    ("metric-direction", [*EVAL, "trainer.lr_scheduler_type=reduce_lr_on_plateau",
                          "trainer.metric_for_best_model=mean_token_accuracy"]),
    ("metric-name", [*EVAL, "trainer.metric_for_best_model=perplexity"]),
    ("best-steps", [*BEST, "trainer.eval_steps=0.1", "trainer.save_steps=0.25"]),
    ("best-steps", [*BEST, "trainer.eval_steps=0.1", "trainer.save_steps=20"]),
    ("best-steps", [*BEST, "trainer.eval_steps=5", "trainer.save_steps=0.5"]),
    ("best-steps", [*BEST, "trainer.eval_steps=0.125", "trainer.save_steps=0.25", "trainer.max_steps=10"]),
    ("prefetch", ["trainer.dataloader_persistent_workers=true"]),
    ("step-counts", ["trainer.warmup_steps=1.5"]),
    ("drop-last", [*EVAL, "trainer.dataloader_drop_last=true", "trainer.per_device_eval_batch_size=32"]),
    ("drop-last", ["trainer.dataloader_drop_last=true", "trainer.per_device_train_batch_size=49", *GPU]),
    ("drop-last", ["trainer.dataloader_drop_last=true", "dataset.limit=4"]),
    *(("optimizer-args", [f"trainer.optim={name}", f"trainer.optim_args='{text}'"]) for name, text in [
        ("adamw_torch", "eps=1"), ("sgd", "momentum"), ("sgd", "momentum=much"), ("rmsprop_bnb", "alpha=0.9"),
        ("ademamix", "t_alpha=1.5"), ("stable_adamw", "kahan_sum=false"), ("sgd", "momentum=nan"), ("sgd", ","),
        ("adamw_anyprecision", "momentum_dtype=half_full"), ("adamw_torch_4bit", "block_size=128"),
    ]),
    ("optimizer-targets", ["trainer.optim_target_modules=all-linear"]),
    ("optimizer-targets", ["trainer.optim=apollo_adamw", "trainer.optim_target_modules=[qproj]"]),
    ("optimizer-layout", ["trainer.optim=galore_adamw_layerwise", "trainer.optim_target_modules=all-linear", *GPU]),
    ("optimizer-layout", ["trainer.optim=galore_adamw_layerwise", "trainer.optim_target_modules=all-linear",
                          "trainer.gradient_accumulation_steps=2"]),
    ("optimizer-layout", ["trainer.optim=schedule_free_adamw", "deepspeed=zero3"]),
    ("step-size", ["trainer.max_grad_norm=1e-9"]),
    ("lm-head-target", ["peft.target_modules='.*'"]),
    ("lm-head-target", ["peft.target_modules='lm_head|.*q_proj'"]),
    ("lm-head-target", ["model.name_or_path=some/unknown", "peft.target_modules='.*'"]),
    *(("peft-sizes", ["peft=none", f"peft.peft_type={kind}", *(f"peft.{s}" for s in settings.split())])
      for kind, settings in [
          ("BOFT", "target_modules=[q_proj] boft_block_size=5"), ("BOFT", "target_modules=[q_proj] boft_block_num=4"),
          ("OFT", "target_modules=[down_proj] oft_block_size=32"), ("OFT", "target_modules=all-linear r=8"),
          ("MISS", "target_modules=[q_proj] r=64"), ("PSOFT", "target_modules=[k_proj] r=32"),
          ("SHIRA", "target_modules=[q_proj] r=17"), ("ROAD", "target_modules=[q_proj] group_size=64"),
          ("VBLORA", "target_modules=[q_proj]"), ("GRALORA", "target_modules=[q_proj] r=9"),
          ("PROMPT_TUNING", "num_virtual_tokens=4 prompt_tuning_init=TEXT"),
          ("P_TUNING", "num_virtual_tokens=4 encoder_hidden_size=8 token_dim=64"),
          ("IA3", "target_modules=[k_proj] feedforward_modules=[down_proj]"),
          ("LOKR", "target_modules=[q_proj] rank_pattern={q_proj:0}"),
          ("LORA", "target_modules=[q_proj] alpha_pattern={q_proj:0}"),
      ]),
    ("peft-nothing", ["peft.base_model_name_or_path=x"]),
    ("unprepared", ["peft=none", "peft.peft_type=CPT", "peft.cpt_token_ids=[5]"]),
    ("range", ["peft.lora_alpha=0"]),
    ("range", ["peft.lora_dropout=1"]),
    ("range", ["trainer.learning_rate=0"]),
    ("range", ["trainer.save_total_limit=0"]),
    ("range", ["trainer.max_length=1"]),
    ("range", ["peft=none", "peft.peft_type=PREFIX_TUNING", "peft.num_virtual_tokens=0"]),
    ("missing-key", ["peft=none", "peft.peft_type=PROMPT_TUNING"]),
    ("choice", ["peft.task_type=SEQ_CLS"]),
    ("choice", ["peft=none", "peft.peft_type=VERA", "peft.bias=some"]),
    ("target-expression", ["peft.exclude_modules='*'"]),
]  # fmt: skip


@pytest.mark.parametrize("id, overrides", ALSO, ids=lambda o: " ".join(o)[-60:] if isinstance(o, list) else o)
def test_fires_on_others_of_its_kind(id: str, overrides: list[str], said):
    assert id in said(*overrides)[0]


@pytest.mark.parametrize("overrides", QUIET, ids=lambda o: " ".join(o)[:60])
def test_is_silent(overrides, said):
    assert said(*overrides) == (set(), set())


def test_valid_lists_warn_of_nothing_but_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for args in VALID:
        plan = api.compose(*make_inputs(tmp_path), "trainer.max_length=64", *args)
        assert {w["rule"] for w in plan.warnings} <= {"quantized-defaults", "batch-beyond-data"}, args


# ---- what depends on the machine ----


@pytest.fixture
def run(base: Path, chat: Path) -> RuleContext:
    plan = api.compose(f"model.name_or_path={base}", f"dataset.path={chat}", "trainer.use_cpu=true").model_dump()
    return RuleContext(
        plan, Report({}), Base(bytes=10**6, numbers=10**6), row_kind="messages", chats=True, world_size=1,
        zero_stage=0, precision="bfloat16", on_this_machine=True,
    )  # fmt: skip


def fired(run: RuleContext) -> set[str]:
    report = Report({})
    table.apply_rules(replace(run, report=report))
    return {p.rule for p in (*report.problems, *report.warnings)}


def test_old_and_missing_gpus(run: RuleContext, monkeypatch: pytest.MonkeyPatch):
    t4, h100 = Gpu("T4", 15.0, (7, 5)), Gpu("H100", 80.0, (9, 0))
    assert "bf16-hardware" in fired(replace(run, gpus=(t4,)))
    assert not {"bf16-hardware", "gpus-missing"} & fired(replace(run, gpus=(h100,)))
    assert "bf16-hardware" not in fired(replace(run, gpus=(t4,), precision="float16"))
    run.plan["launch"]["num_gpus"] = 2
    assert "gpus-missing" in fired(replace(run, gpus=(h100,)))
    monkeypatch.setattr(hardware, "cpu_has_bf16_matmul", lambda: False)
    assert "bf16-slow-cpu" in fired(replace(run, on_cpu=True))


def test_memory_of_host_and_gpu(run: RuleContext):
    assert "host-memory" in fired(replace(run, zero_stage=3, base=Base(bytes=10**15)))
    assert "host-memory" not in fired(replace(run, zero_stage=2, base=Base(bytes=10**15)))
    assert "host-memory" not in fired(replace(run, zero_stage=3))
    run.plan["quantization"] = {"load_in_4bit": True}
    small = replace(run, gpus=(Gpu("small", 16.0, (8, 0)),))
    assert "quantized-gpu-memory" in fired(replace(small, base=Base(numbers=70 * 10**9)))
    assert "quantized-gpu-memory" not in fired(replace(small, base=Base(numbers=13 * 10**9)))
    assert "host-memory" not in fired(replace(run, zero_stage=3, base=Base(bytes=10**15)))


def test_a_port_in_use(run: RuleContext):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        run.plan["launch"].update(master_port=taken.getsockname()[1], launcher="torchrun")
        assert "port-taken" in fired(run)
    assert "port-taken" not in fired(run)


def test_packages_that_are_not_installed(run: RuleContext, monkeypatch: pytest.MonkeyPatch):
    for module in ("quantization", "tracking"):
        monkeypatch.setattr(f"kit.config.rules.{module}.find_spec", lambda name: None)
    run.plan["quantization"] = {"load_in_8bit": True}
    run.plan["trainer"]["report_to"] = ["wandb"]
    assert {"bitsandbytes", "tracker-missing"} <= fired(run)
    run.plan["quantization"] = None
    assert "stored-package" in fired(replace(run, base=Base(config={"quantization_config": {"quant_method": "awq"}})))


def test_what_a_looking_machine_lacks_is_a_warning(base: Path, chat: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kit.config.rules.packages.is_installed", lambda name: name == "torch")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stock = [f"model.name_or_path={base}", f"dataset.path={chat}", "trainer.max_length=128", "trainer.optim=lion_8bit",
             "trainer.use_liger_kernel=true", "trainer.push_to_hub=true", "trainer.use_cpu=true"]  # fmt: skip
    assert [w["rule"] for w in api.compose(*stock).warnings] == ["packages", "packages", "hub-push"]
    with pytest.raises(KitError) as refused:
        api.compose(*stock, here=True)
    assert [p.rule for p in refused.value.problems] == ["packages", "packages", "hub-push"]
    monkeypatch.setattr("kit.config.rules.packages.is_installed", lambda name: False)
    assert [w["rule"] for w in api.compose(*stock).warnings] == ["hub-push"]  # a bare install


def test_remote_code_in_a_file(base: Path, chat: Path, tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(f"model:\n  name_or_path: {base}\n  trust_remote_code: true\ndataset:\n  path: {chat}\n")
    assert {p.rule for p in api.check(str(file))} == {"remote-code"}
    assert api.check(str(file), "model.trust_remote_code=true") == []


def test_warnings_reach_the_user(base: Path, chat: Path, capsys: pytest.CaptureFixture[str]):
    run = [f"model.name_or_path={base}", f"dataset.path={chat}", "trainer.max_steps=10", "trainer.warmup_steps=5"]
    assert cli.run_verb(["check", *run]) == DONE
    out, err = capsys.readouterr()
    assert "50% of the steps are warm-up" in out and "[warmup-half]" in out and "--explain" in err
