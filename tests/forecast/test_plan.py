"""`kit plan`: published arithmetic, measured steps, and the verb as it is typed."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_memory import ALL, LLAMA_8B, LORA, OFF, step, zero

from kit import api
from kit.cli import verbs
from kit.errors import KitError
from kit.explain.plan import forecast_run
from kit.forecast.host_memory import forecast_disk, forecast_host_memory, pinned_bytes
from kit.forecast.hosts import find_host, parse_host
from kit.forecast.memory import PHASES, Sizes, Step, forecast_memory, measure_sizes
from kit.forecast.phases import add_phases
from kit.forecast.step_time import EFFICIENCY, active_linears, count_flops, forecast_time
from kit.inspection.model import inspect_model
from kit.system import hardware

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
from training import CASES  # noqa: E402

H200 = parse_host("h200")
STOCK = ["model=llama3_1_8b", "dataset.path=trl-lib/Capybara", "trainer.max_length=4096"]


def states(parameters: float, processes: int, stage: int) -> float:
    """GB of weights, gradients and optimizer of full fine-tuning under DeepSpeed, as the ZeRO paper counts them."""
    n = int(parameters)
    base = Sizes(LLAMA_8B, n, n, n, 32, n // 40, n // 40, n // 40)
    memory = forecast_memory(step(None, deepspeed=zero(stage), processes=processes, trainer=ALL), base)
    return sum(t.bytes for t in memory.terms if t.name in ("base weights", "gradients", "optimizer")) / 1e9


@pytest.mark.parametrize("stage, gigabytes", [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_zero_papers_picture(stage: int, gigabytes: float):
    """7.5 billion parameters on 64 GPUs (Rajbhandari et al. 2020, figure 1)."""
    assert round(states(7.5e9, 64, stage), 1) == gigabytes


def test_a_billion_parameters_with_adam_are_20_gb():
    """16 bytes a parameter, and 4 for float32 gradients in the step: not 200."""
    n = 10**9
    base = Sizes(LLAMA_8B, n, n, n, 32, 10, 10, 10)
    found = forecast_memory(step(None, deepspeed=zero(2), trainer=ALL, tokens=8), base)
    assert found.peaks["step"] / 1e9 == pytest.approx(20, rel=0.01)


@pytest.mark.parametrize("peft, trainer, times", [
    (None, OFF, 6.0), (None, ALL, 7.12), (LORA, OFF, 4.005), (LORA, ALL, 5.57),
])  # fmt: skip
def test_operations_are_those_that_torch_counts(peft: dict[str, Any] | None, trainer: dict[str, Any], times: float):
    """torch's FlopCounter over 8 layers of Llama-3.1-8B's width, per matmul parameter and token, attention apart."""
    base = measure_sizes(LLAMA_8B | {"num_hidden_layers": 8}, peft)
    assert base
    matmuls = base.linears + 4096 * 128256
    run = step(peft, trainer=trainer, tokens=1000)
    assert count_flops(run, base, 0)[1] / 1000 / matmuls == pytest.approx(times, rel=0.01)


@pytest.mark.parametrize("preset, billions", [("mixtral_8x7b", 12.9), ("qwen3_30b_a3b", 3.35), ("qwen3_8b", 8.2)])
def test_a_token_passes_through_its_experts_alone(preset: str, billions: float):
    """Active parameters as the models' makers give them: 12.9, 3.3 and 8.2 billion with embeddings."""
    plan = api.compose(f"model={preset}", "dataset.path=x/y")
    base = measure_sizes(inspect_model(plan.model, here=False)[0].text, LORA)
    assert base
    ends = 2 * base.text["vocab_size"] * base.text["hidden_size"]
    assert (active_linears(base) + ends) / 1e9 == pytest.approx(billions, rel=0.02)


GEMMA_9B = {
    "model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "head_dim": 256,
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 256000,
}  # fmt: skip
GPT2_XL = {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25, "vocab_size": 50257}
FAST = {"trainer": OFF | {"use_liger_kernel": True}}
BOTH_AWAY = {"deepspeed": zero(3, True), "processes": 2, "trainer": ALL}
MEASURED_SECONDS: list[tuple[dict[str, Any], Step, int, float]] = [
    (LLAMA_8B, step(**FAST), 4096, 0.583),
    (LLAMA_8B, step(**FAST), 400, 0.545),  # packed documents
    (GPT2_XL, step(rows=8, tokens=8192), 1024, 0.372),
    (GEMMA_9B, step(trainer=ALL | {"activation_checkpointing_kwargs": {"selective": True}}), 4096, 1.444),
    (LLAMA_8B, step(None, deepspeed=zero(3), processes=2, trainer=ALL), 4096, 8192 / 6019),
    (LLAMA_8B, step(None, **BOTH_AWAY), 4096, 8192 / 1914),
]


@pytest.mark.parametrize("text, run, row_tokens, seconds", MEASURED_SECONDS)
def test_measured_steps_are_in_the_range(text: dict[str, Any], run: Step, row_tokens: int, seconds: float):
    """H200s: tests/benchmarks/results/2026-11-30-h200-speed.json, and TRL under ZeRO-3 on two."""
    base = measure_sizes(text, run.peft)
    assert base
    found = forecast_time(run, base, H200, 1, row_tokens)
    if text is GEMMA_9B:  # FlexAttention of heads as wide as 256 is slow: beyond the range, and said here
        assert found.slowest < seconds < 1.5 * found.slowest
        return
    assert found.fastest <= seconds <= found.slowest
    assert found.fastest > seconds / 2 and found.slowest < 2 * seconds


def test_gemma_2_with_flex_attention():
    """49.3 GiB on an H200, selective checkpointing: eager scores, or its output kept, would be more than the error."""
    settings = ALL | {"activation_checkpointing_kwargs": {"selective": True}, "use_liger_kernel": True}
    base = measure_sizes(GEMMA_9B | {"tie_word_embeddings": True}, LORA)
    assert base
    peaks = {a: forecast_memory(step(trainer=settings, attention=a), base).peak / 2**30 for a in ("flex_varlen", None)}
    assert peaks["flex_varlen"] == pytest.approx(49.3, rel=0.04) and peaks[None] > 1.1 * 49.3


BASES = ROOT / "tests" / "benchmarks" / "results" / "2026-11-25-h100x2-bases.json"
PRESETS = {"8b": "llama3_1_8b", "7b": "llama2_7b", "1b7": "qwen3_1b7"}
RECORDED = ("lora", "nf4", "int8", "t4", "doctor", "full", "nf4_zero2", "zero2")


def forecast_recorded(case: str) -> float:
    """GiB that is forecast for a run of tests/benchmarks/training.py, which checkpointed all layers."""
    gpus, base, rows, tokens, words = CASES[case]
    words = [*words, f"launch.num_gpus={gpus}", f"trainer.max_length={tokens}", "trainer.packing=false"]
    words += [f"trainer.per_device_train_batch_size={rows}", "trainer.activation_checkpointing=true"]
    if not words[0].startswith("recipe="):
        words += [f"model={PRESETS[base]}", "dataset.path=x/y", "trainer.use_liger_kernel=false"]
    return forecast_run(words, parse_host(f"{gpus}xh100"))["memory"]["allocated"] / 2**30


@pytest.mark.parametrize("case", RECORDED)
def test_recorded_peaks_of_the_kits_own_runs(case: str):
    """On one or two H100s; ZeRO-2's have 0.6 to 0.9 GiB that no term explains yet."""
    recorded = json.loads(BASES.read_text())
    peaks = [
        found[f"{case} kit"]["peak_gb"] for found in (recorded["first"], recorded["second"]) if f"{case} kit" in found
    ]
    assert forecast_recorded(case) == pytest.approx(statistics.median(peaks), rel=0.06)


def test_what_int8_holds_is_more_than_the_error(monkeypatch: pytest.MonkeyPatch):
    whole = forecast_recorded("int8")
    monkeypatch.setattr("kit.explain.plan.measure_sizes", lambda *a: replace(measure_sizes(*a), inputs=0))  # type: ignore[type-var]
    assert forecast_recorded("int8") < 0.5 * whole


def test_a_card_as_fast_as_its_data_sheet_is_out_of_the_range(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kit.forecast.step_time.EFFICIENCY", 1.0)
    base = measure_sizes(LLAMA_8B, LORA)
    assert base and EFFICIENCY < 1
    assert forecast_time(step(**FAST), base, H200, 1, 4096).slowest < 0.583


def test_zero_3_waits_for_its_link():
    base = measure_sizes(LLAMA_8B, LORA)
    assert base
    slow, fast = (forecast_time(step(deepspeed=zero(3), processes=8), base, parse_host(h), 1, 4096)
                  for h in ("8xa800", "8xa100"))  # fmt: skip
    assert slow.link_seconds == pytest.approx(1.5 * fast.link_seconds)  # 400 against 600 GB/s
    assert slow.link_bytes == pytest.approx(2 * 2 * base.total * 7 / 8)  # two gathers in 16 bits, an eighth is here


def test_an_offloaded_optimizer_in_host_memory():
    """18 bytes a parameter and process, as DeepSpeed keeps them; pinned buffers are powers of two."""
    base = measure_sizes(LLAMA_8B, None)
    assert base
    plain = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
    run = step(None, deepspeed={"zero_optimization": plain}, processes=2)
    held = sum(t.bytes for t in forecast_host_memory(run, base, 2) if t.name != "processes")
    assert held == pytest.approx(18 * base.total)
    pinned = replace(run, deepspeed={"zero_optimization": plain | {"offload_optimizer": {"device": "cpu"}}})
    more = sum(t.bytes for t in forecast_host_memory(pinned, base, 2) if t.name != "processes")
    assert held < more < 2 * held and pinned_bytes(5) == 8 and pinned_bytes(8) == 8


def test_disk():
    base = measure_sizes(LLAMA_8B, LORA)
    assert base
    trainer = {"save_strategy": "steps", "save_steps": 100, "save_total_limit": 2}
    terms = {t.name: t.bytes for t in forecast_disk(step(), base, trainer, 1000)}
    assert terms == {"adapter": base.trained * 4, "checkpoints": 3 * base.trained * 12}  # one more while it is written
    assert {t.name for t in forecast_disk(step(), base, {"save_strategy": "no"}, 1000)} == {"adapter"}


@pytest.mark.parametrize("text, gpu, count, memory", [
    ("2x4090_128gb", "RTX 4090", 2, 128), ("8xa800", "A800", 8, None), ("4xv100_32", "V100 32 GB", 4, None),
    ("h100x8", "H100 SXM", 8, None), ("H200", "H200", 1, None), ("a100-40x4", "A100 40 GB", 4, None),
    ("2xrtx3090_64GB", "RTX 3090", 2, 64), ("a100", "A100 80 GB", 1, None),
])  # fmt: skip
def test_hosts(text: str, gpu: str, count: int, memory: float | None):
    host = parse_host(text)
    assert (host.gpu, host.count, host.memory_gb) == (gpu, count, memory)


@pytest.mark.parametrize("text", ["", "9x", "8xa9000", "0xh100", "2x", "4090x4090", "100000xh100", "h100x", "_128gb"])
def test_hosts_that_nobody_knows(text: str):
    with pytest.raises(KitError) as refused:
        parse_host(text)
    assert refused.value.problems[0].fix


@pytest.mark.parametrize("name, gigabytes, known", [
    ("NVIDIA H200", 140.4, "H200"), ("NVIDIA A100-SXM4-40GB", 40.0, "A100"), ("NVIDIA GeForce RTX 4090", 24.0, "4090"),
    ("Tesla T4", 15.0, "T4"), ("NVIDIA GeForce GTX 1080", 8.0, None),
])  # fmt: skip
def test_this_machines_gpus(name: str, gigabytes: float, known: str | None):
    host = find_host((hardware.Gpu(name, gigabytes, (8, 0)),) * 2, 64)
    assert (host is None) is (known is None)
    if host:
        assert known and known in host.gpu and host.count == 2 and host.memory_gib == gigabytes
        assert host.tflops == parse_host(known.lower() + "_40" * (gigabytes == 40.0)).tflops


def run_plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    code = verbs.run_verb(["plan", *words])
    out = capsys.readouterr()
    return code, out.out + out.err


def test_what_it_prints(capsys: pytest.CaptureFixture[str]):
    code, text = run_plan(capsys, *STOCK, "hardware=2x4090_128gb", "trainer.max_steps=1000", "--price", "0.4")
    assert code == 0 and "2 x RTX 4090, 24.0 GiB each, 128 GB of host memory; 2 processes, DDP" in text
    for word in (
        "base weights                    16.1 GB",
        "of 25.8 GB on each: fits",
        "for 1,000 steps",
        "cost ",
        "MFU",
    ):
        assert word in text, text
    code, out = run_plan(capsys, *STOCK, "hardware=2x4090_128gb", "trainer.max_steps=1000", "--price", "0.4", "--json")
    found = json.loads(out)
    for phase, peak in found["memory"]["peaks"].items():
        terms = [t["bytes"] for t in found["memory"]["terms"] if t["phase"] in PHASES[phase]]
        assert sum(terms) == pytest.approx(peak)
    assert all(t["formula"] and t["source"] for t in found["memory"]["terms"])
    hours = [s * 2 / 3600 for s in found["total"]["seconds"]]
    assert found["total"]["cost"] == pytest.approx([0.4 * h for h in hours])
    assert hardware.ASSUMED.get() is None


def test_what_does_not_fit_and_what_would(capsys: pytest.CaptureFixture[str]):
    """Each change that is named fits when it is typed."""
    code, out = run_plan(capsys, *STOCK, "peft=none", "hardware=8xh100", "--json")
    found = json.loads(out)
    assert code == 2 and not found["memory"]["fits"] and found["changes"][0]["overrides"] == ["deepspeed=auto"]
    for change in found["changes"]:
        words = [w for w in STOCK if w.partition("=")[0] not in {c.partition("=")[0] for c in change["overrides"]}]
        code, _ = run_plan(capsys, *words, "peft=none", "hardware=8xh100")
        assert code == 2
        rest = ["peft=none"] if not any(c.startswith("peft=") for c in change["overrides"]) else []
        code, text = run_plan(capsys, *words, *rest, *change["overrides"], "hardware=8xh100")
        assert code == 0, text
    code, text = run_plan(capsys, "model=llama3_1_405b", "dataset.path=x/y", "hardware=t4", "trainer.max_length=4096")
    assert code == 2 and "nothing that was tried fits" in text


def test_host_memory_counts_too(capsys: pytest.CaptureFixture[str]):
    """70B in 16 bits, offloaded: 2 x 24 GB of GPU memory do, 128 GB of host memory do not."""
    words = ["model=llama3_1_70b", "dataset.path=x/y", "trainer.max_length=512", "deepspeed=zero3_offload"]
    code, text = run_plan(capsys, *words, "hardware=2x4090_128gb")
    assert code == 2 and "GB on each: fits" in text and "of 128.0 GB: does not fit" in text
    code, text = run_plan(capsys, *words, "hardware=2x4090_256gb", "launch.num_nodes=2", "launch=deepspeed")
    assert code == 0 and "several nodes" in text, text


def test_the_data_makes_steps_and_attention(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Packed documents attend within themselves, and an epoch of them has fewer steps; all counted from the file."""
    data = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "hello there " * 20}, {"role": "assistant", "content": "general " * 120}]
    data.write_text(20000 * (json.dumps({"messages": turns}) + "\n"))
    words = [
        str(data),
        "model=llama3_1_8b_instruct",
        "hardware=h100",
        "trainer.max_length=4096",
        "--json",
        "trainer.num_train_epochs=1",
    ]
    packed, padded = (json.loads(run_plan(capsys, *words, f"trainer.packing={p}")[1]) for p in ("auto", "false"))
    assert packed["documents"]["count"] == pytest.approx(20000, rel=0.1) and 200 < packed["documents"]["mean"] < 400
    tokens = packed["documents"]["count"] * packed["documents"]["mean"]
    assert packed["total"]["tokens"] == pytest.approx(tokens, rel=0.1)
    assert packed["total"]["tokens"] < padded["total"]["tokens"] / 5
    assert packed["step"]["model_flops"] < padded["step"]["model_flops"]


def test_values_side_by_side(capsys: pytest.CaptureFixture[str]):
    """Each line is what the value gives alone; a refused value says why, and the others stand."""
    values = ["deepspeed=zero2", "deepspeed=zero3", "deepspeed=zero9"]
    code, text = run_plan(capsys, *STOCK, "hardware=2x4090_128gb", "--compare", "deepspeed=zero2,zero3,zero9")
    lines = text.splitlines()[1:]
    assert code == 0 and [line.split()[0] for line in lines] == values and "refused: " in lines[2]
    for value, line in zip(values[:2], lines[:2], strict=True):
        _, alone = run_plan(capsys, *STOCK, "hardware=2x4090_128gb", value)
        needed = alone.split("GPU memory ")[1].split()[0]
        assert f" {needed} of 25.8 " in line, line
    code, out = run_plan(capsys, *STOCK, "peft=none", "--json", "--compare", "hardware=t4,8xh200,8xa9000")
    found = json.loads(out)
    assert code == 0 and [row.get("fits") for row in found] == [False, True, None] and "A9000" in str(found).upper()
    code, _ = run_plan(capsys, *STOCK, "peft=none", "--compare", "hardware=t4,l4")
    assert code == 2


@pytest.mark.parametrize("words, said", [
    (["hardware=t4", "--compare", "deepspeed"], "names no values"),
    (["hardware=8xa9000"], "names no GPU that is known"), ([], "this machine has no GPU"),
    (["hardware=h100", "hardware=t4"], "given several times"), (["hardware=h100", "--price", "-1"], "is no price"),
    (["hardware=h100", "launch.num_gpus=2", "launch=deepspeed"], "takes 2 GPUs of 1"),
    (["hardware=h100", "trainer.use_cpu=true"], "forecasts GPUs"),
    (["hardware=h100", "trainer.max_length=null", "trainer.packing=false"], "has no size"),
    (["hardware=h100", "peft.peft_type=IA3"], "the memory of IA3 is not forecast"),
    (["hardware=h100", "trainer.lr=1"], "trainer.lr"),
    (["hardware=h100", "model=none", "model.name_or_path=no/such"], "config.json of no/such is not on this machine"),
    (["hardware=2xh100", "++fsdp.reshard_after_forward=true"], "FSDP is not forecast"),
])  # fmt: skip
def test_what_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    code, text = run_plan(capsys, *STOCK, *words)
    assert code in (2, 3) and said in text and "Traceback" not in text and "fix:" in text


def test_phases_beside_the_step():
    """Loading, evaluation and saves have terms of their own, and never less than what stands there anyway."""
    base = measure_sizes(LLAMA_8B, None)
    assert base
    trainer = ALL | {"eval_strategy": "steps", "per_device_eval_batch_size": 8}
    run = step(None, deepspeed=zero(3), processes=4, trainer=trainer)
    found = add_phases(forecast_memory(run, base), run, base)
    assert list(found.peaks) == ["load", "loss", "backward", "step", "evaluate", "save"]
    embedding = 128256 * 4096
    assert found.peaks["load"] == base.total * 2 / 4 + embedding * 2
    states = base.total * 16 / 4
    assert found.peaks["save"] == pytest.approx(states + embedding * 2 + found.of("always") - base.total * 14 / 4)
    assert found.peaks["evaluate"] > found.peaks["save"]
    few = step(None, deepspeed=zero(3), processes=4, trainer=trainer | {"per_device_eval_batch_size": 1})
    assert add_phases(forecast_memory(few, base), few, base).peaks["evaluate"] < found.peaks["evaluate"]
    alone = step(trainer={"eval_strategy": "no"})
    adapter = measure_sizes(LLAMA_8B, LORA)
    assert adapter and list(add_phases(forecast_memory(alone, adapter), alone, adapter).peaks) == [
        "loss",
        "backward",
        "step",
    ]


def test_nvme():
    """Optimizer states and weights on NVMe are on the disk and in buffers of fixed size, not in host memory."""
    base = measure_sizes(LLAMA_8B, None)
    assert base
    optimizer, param = {"device": "nvme", "buffer_count": 4}, {"device": "nvme", "buffer_count": 5}
    param |= {"buffer_size": 10**8, "max_in_cpu": 0}
    block = {"stage": 3, "sub_group_size": 10**9, "offload_optimizer": optimizer, "offload_param": param}
    run = step(None, deepspeed={"zero_optimization": block}, processes=2)
    host = {t.name: t.bytes for t in forecast_host_memory(run, base, 2)}
    assert host["buffers of weights"] == 2 * 5 * pinned_bytes(2 * 10**8) and "Adam's states" not in host
    assert host["buffers of optimizer states"] == 2 * 4 * pinned_bytes(base.total / 9 / 2 * 4)
    block = block | {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    in_memory = forecast_host_memory(replace(run, deepspeed={"zero_optimization": block}), base, 2)
    assert sum(host.values()) < 0.5 * sum(t.bytes for t in in_memory)
    disk = {t.name: t.bytes for t in forecast_disk(run, base, {"save_strategy": "no"}, 10)}
    assert disk["optimizer, on NVMe"] == base.total * 16 and disk["param, on NVMe"] == base.total * 2
