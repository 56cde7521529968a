"""The table of rules: each is told, each fires where it should and is silent where it should be, none is missing."""

from __future__ import annotations

import ast
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from soak import VALID, make_inputs, mutations
from test_cli_check import REFUSED_RUNS

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
    assert "modules_to_save=[lm_head]" in told and "peft.target_modules" in told and "T38" in told
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
            rules_given = [] if name == "KitError" else node.args[3:4]
            rules_given += [k.value for k in node.keywords if k.arg == "rule"]
            assert rules_given or name == "KitError", f"{file.name}:{node.lineno} names no rule"
            for rule in rules_given:
                if isinstance(rule, ast.Constant):
                    assert rule.value in IDS, f"{file.name}:{node.lineno} {rule.value}"


def test_what_reports_a_rule_exists_and_names_it():
    for rule in RULES:
        if rule.reported_by:
            source = (ROOT / "kit" / f"{rule.reported_by}.py").read_text(encoding="utf-8")
            assert f'"{rule.id}"' in source, rule.id


def test_no_problem_leaves_without_a_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    stock = make_inputs(tmp_path)
    wrong = [[*stock, *overrides] for overrides, *_ in REFUSED_RUNS]
    wrong += [["recipe=nothing"], ["nothing"], ["no.yaml"], ["name=${oc.env:NOT_SET_ANYWHERE}"], ["name='["]]
    seen = set()
    for args in [*wrong, *mutations(12, seed=1, folder=tmp_path)]:
        for problem in api.check(*args):
            assert problem.rule in IDS, (args, problem)
            seen.add(problem.rule)
    assert len(seen) > 25


# ---- each check fires, and only where it should ----

MOE = ["model.name_or_path=some/moe", "model.config={model_type: olmoe, num_experts: 8, hidden_size: 64}"]
GPT2 = ["model=gpt2", "tokenizer.pad_token=null"]
TIED = ["model=llama3_2_1b"]
NF4 = ["quantization=nf4"]
GPU = ["launch.num_gpus=2", "trainer.use_cpu=false"]
CPU = ["trainer.use_cpu=true"]
EVAL = ["trainer.eval_strategy=steps", "dataset.test_size=0.2"]
STREAM = ["dataset.streaming=true"]
HERE = {"bf16-hardware", "bf16-slow-cpu", "gpus-missing", "port-taken", "host-memory", "quantized-gpu-memory",
        "bitsandbytes", "tracker-missing", "loftq-packages"}  # fmt: skip
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
    "moe-leaf": [*MOE, "deepspeed=zero3", *GPU],
    "autotp-experts": [*MOE, "deepspeed=zero1", "deepspeed.tensor_parallel.autotp_size=2"],
    "autotp-heads": ["deepspeed=zero1", "deepspeed.tensor_parallel.autotp_size=4"],
    "attention-name": ["model.attn_implementation=flash"],
    "attention-precision": ["model.attn_implementation=flash_attention_2", *CPU],
    "packing-recurrent": ["model.name_or_path=some/mamba", "model.config.model_type=mamba2", "trainer.packing=true"],
    "lm-head-target": ["peft.target_modules=[q_proj,lm_head]"],
    "targets-match": ["peft.target_modules=[q_prj]"],
    "patterns-match": ["peft.rank_pattern={q_prj: 4}"],
    "saved-match": ["peft.modules_to_save=[embed_tokes]"],
    "layers-range": ["peft.layers_to_transform=[0,7]", "peft.target_modules=[q_proj]"],
    "tied-target": [*TIED, "peft.target_modules=[q_proj,embed_tokens]"],
    "tied-saved": [*TIED, "peft.modules_to_save=[lm_head]"],
    "prefix-checkpointing": ["peft=none", "peft.peft_type=PREFIX_TUNING", "peft.num_virtual_tokens=4"],
    "best-model": ["trainer.load_best_model_at_end=true"],
    "best-steps": [*EVAL, "trainer.load_best_model_at_end=true", "trainer.eval_steps=3", "trainer.save_steps=4"],
    "best-metric": [*EVAL, "trainer.save_strategy=best"],
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
    "reentrant": ["deepspeed=zero3", "trainer.gradient_checkpointing_kwargs={use_reentrant: false}"],
    "quantized-bits": ["quantization.load_in_4bit=true", "quantization.load_in_8bit=true"],
    "quantized-defaults": ["quantization.load_in_4bit=true"],
    "quantized-full": [*NF4, "peft=none"],
    "quantized-peft": [*NF4, "peft.init_lora_weights=pissa"],
    "quantized-saved-module": [*NF4, "peft.modules_to_save=[q_proj]", "peft.target_modules=[v_proj]"],
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
    ["peft.layers_to_transform=[0,1]", "peft.target_modules=[q_proj]"],
]  # fmt: skip


@pytest.mark.parametrize("overrides", QUIET, ids=lambda o: " ".join(o)[:60])
def test_is_silent(overrides, said):
    assert said(*overrides) == (set(), set())


def test_valid_lists_warn_of_nothing_but_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for args in VALID:
        plan = api.compose(*make_inputs(tmp_path), "trainer.max_length=64", *args)
        assert {w["rule"] for w in plan.warnings} <= {"quantized-defaults"}, args


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
    for module in ("adapter", "quantization", "tracking"):
        monkeypatch.setattr(f"kit.config.rules.{module}.find_spec", lambda name: None)
    run.plan["quantization"] = {"load_in_8bit": True}
    run.plan["trainer"]["report_to"] = ["wandb"]
    run.plan["peft"]["init_lora_weights"] = "loftq"
    assert {"bitsandbytes", "tracker-missing", "loftq-packages"} <= fired(run)


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
