"""trainer.packing=auto: what decides it, that the estimate is near what is prepared, and that runs keep theirs."""

from __future__ import annotations

import csv
import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import write_rows
from soak import make_inputs

from kit import api
from kit.config import packing
from kit.config.inputs import inspect_data
from kit.config.rules.table import RULES
from kit.data import prepare
from kit.errors import KitError
from kit.models.load import load_tokenizer
from kit.schema.run_plan import RunPlan

LENGTH = 256
TOLERANCE = 0.25
ONE_ROW_A_STEP = ("trainer.per_device_train_batch_size=1", "launch.num_gpus=1", "trainer.use_cpu=true",
                  "trainer.bf16=false")  # fmt: skip
WORDS = [word for word in tiny.WORDS if len(word) < 6]  # with a blank 4.2 bytes each: what a token is in real ones
CHINESE = (
    "我 你 他 的 是 在 有 不 了 去 医生 病人 头痛 发烧 咳嗽 休息 喝水 吃药 今天 明天 多少 可以 应该 帮助 谢谢".split()
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def words(number: int, count: int) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=count))


def chats(count: int, least: int = 20, most: int = 60) -> list[dict]:
    """Chats whose answers have from `least` to `most` words, each a token of the tiny tokenizer."""
    drawn = random.Random(count)
    return [{"messages": [{"role": "user", "content": words(n, 12)},
                          {"role": "assistant", "content": words(-n, drawn.randint(least, most))}]}
            for n in range(count)]  # fmt: skip


def texts(count: int) -> list[dict]:
    return [{"text": row["messages"][1]["content"]} for row in chats(count)]


def chinese(count: int) -> list[dict]:
    return [{"text": "".join(random.Random(n).choices(CHINESE, k=40 + n % 40))} for n in range(count)]


def as_csv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def as_table(path: Path, rows: list[dict]) -> None:
    import pyarrow
    from pyarrow import ipc, parquet

    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
        return
    with pyarrow.OSFile(str(path), "wb") as sink, ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)


def as_lines(path: Path, rows: list[dict]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)  # in ASCII, a letter of Chinese takes six bytes
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


def decided(plan: RunPlan) -> tuple[bool, str]:
    """Whether documents are packed, and what is noted of it."""
    notes = [note for note in plan.notes if note.startswith("packing: ")]
    assert len(notes) <= 1
    return plan.trainer["packing"], "".join(notes)


@pytest.fixture
def plan_of(base: Path, tmp_path: Path) -> Callable[..., RunPlan]:
    def make(*overrides: str, data: list[dict] | None = None) -> RunPlan:
        given = {o.partition("=")[0] for o in overrides}
        stock = [] if "model.name_or_path" in given else [f"model.name_or_path={base}"]
        stock += [] if "trainer.max_length" in given else [f"trainer.max_length={LENGTH}"]
        if not given & {"dataset.path", "dataset.mix"}:
            stock.append(f"dataset.path={write_rows(tmp_path / 'rows.jsonl', chats(900) if data is None else data)}")
        return api.compose(*stock, *ONE_ROW_A_STEP, *overrides)

    return make


def packed_rows(plan: RunPlan) -> tuple[float, int]:
    """(the rows that are estimated, those that are made) of a plan's data."""
    samples = inspect_data(plan.dataset, here=True)[0].samples
    documents = packing.estimate_documents(plan.dataset, samples, plan.trainer)
    assert documents is not None
    report = prepare.read_report(prepare.prepare_data(plan, load_tokenizer(plan)))
    return documents.packed_rows(plan.trainer["max_length"]), report["splits"]["train"]["packed"]


FILES: dict[str, tuple[Any, list[dict]]] = {
    "chats.jsonl": (as_lines, chats(900)),
    "texts.jsonl.gz": (as_lines, texts(900)),
    "list.json": (lambda path, rows: path.write_text(json.dumps(rows, indent=4)), texts(900)),
    "object.json": (lambda path, rows: path.write_text(json.dumps({"data": rows}, indent=4)), texts(900)),
    "texts.csv": (as_csv, texts(900)),
    "chats.parquet": (as_table, chats(900)),
    "texts.arrow": (as_table, texts(900)),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_estimated(name, plan_of, tmp_path):
    write, rows = FILES[name]
    write(tmp_path / name, rows)
    plan = plan_of(f"dataset.path={name}")
    packs, note = decided(plan)
    estimated, made = packed_rows(plan)
    assert packs and estimated == pytest.approx(made, rel=TOLERANCE)
    figures = (
        "packing: on, documents of about {0} tokens against max_length 256: {0} rows become about {0} rows of 256"
    )
    assert re.fullmatch((figures + ", {0} optimizer steps an epoch instead of {0}; .*").format(r"[\d,]+"), note), note


@pytest.mark.parametrize(("more", "packs"), [
    ([], True),
    (["dataset.limit=700"], True),
    (["dataset.limit=300"], False),  # 82 rows: too few steps
    (["dataset.test_size=0.1", "dataset.validation_size=0.1"], True),
    (["dataset.test_size=0.3", "dataset.validation_size=0.35"], False),
    (["dataset.test_size=600"], False),
    (["dataset.split='train[:80%]'"], True),
    (["dataset.split='train[-200:]'"], False),
    (["trainer.packing_strategy=bfd_split"], True),
    (["dataset.on_long_row=split", "trainer.max_length=160"], True),
    (["trainer.max_length=96"], False),  # documents of more than half of it
    (["trainer.max_steps=100"], True),
    (["trainer.max_steps=400"], False),  # two passes over packed rows
    (["global_batch_size=8"], False),
], ids=str)  # fmt: skip
def test_the_parts_of_the_data_that_are_trained_count(more, packs, plan_of):
    plan = plan_of(*more)
    assert decided(plan)[0] is packs, plan.notes
    if packs:
        estimated, made = packed_rows(plan)
        assert estimated == pytest.approx(made, rel=TOLERANCE)


@pytest.mark.parametrize(("weights", "more"), [
    (("", ""), []),
    (("", ", limit: 300"), []),
    ((", weight: 3", ", weight: 1"), []),
    ((", weight: 1", ", weight: 1"), ["dataset.mix_until=all_exhausted"]),
], ids=str)  # fmt: skip
def test_a_mix_is_counted_as_it_is_drawn(weights, more, plan_of, tmp_path):
    sets = [write_rows(tmp_path / "short.jsonl", chats(500)), write_rows(tmp_path / "long.jsonl", chats(400, 60, 160))]
    mix = ", ".join(f"{{path: {path}{weight}}}" for path, weight in zip(sets, weights, strict=True))
    given = [f"dataset.mix=[{mix}]", "trainer.max_length=512", *more]
    plan = plan_of(*given)
    estimated, made = packed_rows(plan_of(*given, "trainer.packing=true"))
    assert estimated == pytest.approx(made, rel=TOLERANCE)
    assert decided(plan)[0] is (estimated >= packing.MIN_STEPS)


def test_chinese_is_counted_by_its_bytes(plan_of, base, tmp_path):
    """With a tokenizer of one and two letters, as real ones have it: 0.6 to 0.8 tokens a letter."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast

    folder, rows = tmp_path / "chinese", chinese(900)
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.train_from_iterator(
        (row["text"] for row in rows),
        trainers.BpeTrainer(vocab_size=90, special_tokens=tiny.SPECIAL, max_token_length=2, show_progress=False),
    )
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 90}))
    PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    as_lines(tmp_path / "chinese.jsonl", rows)
    plan = plan_of(f"model.name_or_path={folder}", "dataset.path=chinese.jsonl")
    estimated, made = packed_rows(plan)
    assert decided(plan)[0] and estimated == pytest.approx(made, rel=TOLERANCE)


def test_a_wrong_measure_of_text_is_noticed(plan_of, monkeypatch):
    monkeypatch.setattr(packing, "TOKENS_PER_BYTE", 0.4)
    estimated, made = packed_rows(plan_of("trainer.packing=true"))
    assert estimated != pytest.approx(made, rel=TOLERANCE)


# ---- what is said where it stays off ----


def test_few_steps_are_told_with_the_way_to_pack(plan_of):
    packs, note = decided(plan_of("global_batch_size=8"))
    assert not packs and "optimizer steps an epoch instead of 120; trainer.packing=true packs them" in note
    packs, note = decided(plan_of("trainer.max_steps=400"))
    assert not packs and "passes over the data instead of one or less; trainer.packing=true packs them" in note
    assert decided(plan_of(data=chats(20))) == (False, "")  # nobody would pack them
    assert decided(plan_of(data=chats(300, 200, 250))) == (False, "")  # nor these


def test_rows_that_are_not_here_are_told_of(plan_of):
    packs, note = decided(plan_of("dataset.path=some/rows"))
    assert not packs and "is not known here" in note


OFF = {
    "packing-wrapped": ["trainer.packing_strategy=wrapped"],
    "packing-length": ["trainer.max_length=null"],
    "sampling": ["trainer.train_sampling_strategy=group_by_length"],
    "padding-free": ["trainer.padding_free=true"],
    "padding-free, uncut": ["trainer.padding_free=true", "trainer.max_length=null"],
    "packing-recurrent": ["model.name_or_path=some/base", "model.config={model_type: qwen3_next, hidden_size: 64}"],
    "own code": ["model.trust_remote_code=true"],
    "stream": ["dataset.streaming=true", "trainer.max_steps=100"],
    "attention": ["model.attn_implementation=sdpa"],
    "attention of the library": ["model.attn_implementation=null"],
    "compiled": ["trainer.torch_compile=true"],
    "unknown": ["model.name_or_path=some/base", "model.config={model_type: unheard_of, hidden_size: 64}"],
    "prompt": ["peft.peft_type=PROMPT_TUNING", "peft.num_virtual_tokens=4"],
    "script": ["launch.script=mine.py"],
}  # fmt: skip


@pytest.mark.parametrize("name", OFF)
def test_auto_never_packs_what_a_rule_refuses(name, plan_of, tmp_path):
    """What is said of the run is what is said of it with packing=false."""
    (tmp_path / "mine.py").write_text("")
    said = []
    for value in ("auto", "false"):
        try:
            plan = plan_of(*OFF[name], f"trainer.packing={value}")
            assert plan.trainer["packing"] is False
            said.append({w["rule"] for w in plan.warnings})
        except KitError as error:
            said.append({p.rule for p in error.problems})
    assert said[0] == said[1]


def test_each_rule_that_reads_packing_is_asked():
    reading = {rule.id for rule in RULES if "trainer.packing" in rule.keys}
    assert (
        reading == {"packing-recurrent", "packing-wrapped", "packing-length", "sampling", "padding-free"} <= OFF.keys()
    )


# ---- names and resumes ----

NOWHERE = ("model.name_or_path=some/base", "model.config={model_type: llama, hidden_size: 64}",
           "dataset.path=some/rows", "launch.num_gpus=1", "trainer.use_cpu=true", "trainer.bf16=false")  # fmt: skip


@pytest.mark.parametrize(("more", "hash"), [
    ([], "54fdbbab"),
    (["trainer.packing=auto"], "54fdbbab"),
    (["~trainer.packing"], "54fdbbab"),
    (["trainer.packing=false"], "cd07f9e8"),
    (["trainer.packing=true"], "e352cb12"),
], ids=str)  # fmt: skip
def test_runs_have_the_names_of_before_this_choice(more, hash):
    assert api.compose(*NOWHERE, *more).hash == hash


def test_a_packed_run_has_the_name_of_one_that_was_told_to(plan_of):
    assert plan_of().hash == plan_of("trainer.packing=true").hash != plan_of("trainer.packing=false").hash


def test_a_resume_keeps_what_the_run_began_with(tmp_path):
    stock = [*make_inputs(tmp_path), *ONE_ROW_A_STEP, "trainer.max_length=256"]
    file = Path(stock[1].partition("=")[2])
    rows = file.read_text()
    few = api.compose(*stock)
    write_rows(file, chats(900))
    many = api.compose(*stock)
    assert (few.trainer["packing"], many.trainer["packing"]) == (False, True)
    assert api.override_plan(few, ["trainer.save_steps=5"]).trainer["packing"] is False
    file.write_text(rows)
    longer = api.override_plan(many, ["trainer.save_steps=5"])
    for plan in (longer, api.override_plan(longer, ["trainer.save_steps=6"]),
                 api.override_plan(many, ["trainer.packing=true"])):  # fmt: skip
        assert plan.trainer["packing"] is True and plan.composed["trainer"]["packing"] == "auto"
        assert plan.model.attn_implementation == many.model.attn_implementation
    with pytest.raises(KitError, match="cannot change within a run"):
        api.override_plan(many, ["trainer.packing=false"])


def test_a_run_of_before_this_choice_goes_on_as_it_was(tmp_path):
    stock = [*make_inputs(tmp_path), *ONE_ROW_A_STEP, "trainer.max_length=256"]
    write_rows(Path(stock[1].partition("=")[2]), chats(900))
    old = api.compose(*stock, "~trainer.packing")
    assert "packing" not in old.trainer and "packing" not in old.composed["trainer"]
    longer = api.override_plan(old, ["trainer.save_steps=5"])
    assert "packing" not in longer.trainer and longer.hash == old.hash


def test_the_origin_is_told(tmp_path):
    from kit.explain import why

    write_rows(tmp_path / "rows.jsonl", chats(900))
    data = ("dataset.path=rows.jsonl", "model=llama3_1_8b_instruct", "trainer.max_length=256")
    told = why.explain_key("trainer.packing", *data, *ONE_ROW_A_STEP)
    assert told["value"] is True and told["set"].startswith("auto: ") and told["over"][0]["value"] == "auto"
    assert told["becomes"] == ["SFTConfig(packing=true)"]
