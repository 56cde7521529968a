"""`kit data`: what is counted and shown of a file, with a model and without, and what it leaves behind."""

from __future__ import annotations

import gzip
import json
import random
import stat
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny
from conftest import write_rows

from kit import api
from kit.cli import verbs as cli
from kit.data import prepare, preview
from kit.errors import DONE, REFUSED, KitError
from kit.storage import run_directory
from kit.system import dependencies, terminal
from kit.training import run as training_run

NO_ANSWER = {"messages": [{"role": "user", "content": "head"}]}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 20 good chats, one of them twice, a row without an answer (22) and half a line (23)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "cache"))
    rows = tiny.chat_rows(20)
    write_rows(tmp_path / "my.jsonl", [*rows, rows[3], NO_ANSWER])
    with open(tmp_path / "my.jsonl", "a") as f:
        f.write('{"messages": [\n')
    return tmp_path


@pytest.fixture
def model(base: Path) -> list[str]:
    return [f"model.name_or_path={base}", "trainer.max_length=64", "trainer.per_device_train_batch_size=4"]


def tree_of(value, depth: int = 2):
    """The keys of a JSON object, so deep."""
    return {k: tree_of(v, depth - 1) for k, v in value.items()} if isinstance(value, dict) and depth else None


def test_raw_rows_without_a_model(here: Path):
    shown = api.data("my.jsonl")
    train = shown["splits"]["train"]
    assert (train["read"], train["kept"], train["duplicates"]) == (23, 21, 1)
    assert train["kept"] + sum(train["dropped"].values()) == train["read"]
    assert [(bad["row"], bad["kind"]) for bad in train["bad"]] == [(22, "bad"), (23, "bad")]
    data = (here / "my.jsonl").read_bytes()
    for bad in train["bad"]:
        assert data[: bad["offset"]].count(b"\n") == bad["row"] - 1
    [source] = shown["sources"]
    assert (source["format"], [r["row"] for r in source["raw"]]) == ("messages", [1, 2, 3])
    assert shown["refused"] and len(shown["problems"]) == 2


def test_exit_codes_and_what_is_printed(here: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.run_verb(["data", "my.jsonl"]) == REFUSED
    said = capsys.readouterr()
    assert "21 rows kept + 2 left out = 23 read" in said.out and "my.jsonl row 22 (byte " in said.out
    assert said.err.startswith("refused: bad rows, listed above") and "dataset.on_bad_row=drop" in said.err
    assert cli.run_verb(["data", "my.jsonl", "dataset.on_bad_row=drop", "dataset.max_bad_rows=0.1"]) == DONE
    assert cli.run_verb(["data", "my.jsonl", "dataset.on_bad_row=drop", "dataset.max_bad_rows=1"]) == REFUSED


def test_json_has_stable_keys(here: Path, model: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.run_verb(["data", "my.jsonl", "--json"]) == REFUSED
    raw = json.loads(capsys.readouterr().out)
    assert set(raw) == {"model", "sources", "splits", "notes", "problems", "refused"}
    counts = {"read", "kept", "dropped", "duplicates", "bad"}
    assert set(raw["splits"]["train"]) == counts
    assert cli.run_verb(["data", "my.jsonl", *model, "--json"]) == REFUSED
    made = json.loads(capsys.readouterr().out)
    assert set(made) == set(raw) | {"train_on", "epoch", "samples", "cache"}
    figures = {"rows", "tokens", "trained", "trained_share", "no_end", "notes", "lengths", "batch_rows", "text"}
    assert set(made["splits"]["train"]) == counts | figures | {"pad_share", "packed_pad_share"}
    assert set(made["splits"]["train"]["lengths"]) == {"median", "p90", "p99", "max"}


def test_duplicates_across_splits(here: Path, model: list[str]):
    rows = tiny.chat_rows(30)
    write_rows(here / "train.jsonl", rows[:20])
    write_rows(here / "held.jsonl", [*rows[15:], rows[25]])
    for shown in (api.data(*names) for names in ([], model) for names in [["train.jsonl", HELD, *names]]):
        part = shown["splits"]["validation"]
        assert (part["in_train"], part["duplicates"], shown["splits"]["train"]["duplicates"]) == (5, 1, 0)


HELD = "dataset.eval_path=held.jsonl"


def test_a_run_finds_what_was_prepared(here: Path, model: list[str], capsys: pytest.CaptureFixture[str]):
    write_rows(here / "good.jsonl", tiny.chat_rows(20))
    words = ["good.jsonl", *model, "dataset.train_on=assistant_turns"]
    assert cli.run_verb(["data", *words]) == DONE
    said = capsys.readouterr().out
    assert "<|assistant|>« " in said and "</s>»" in said and "(loss on assistant turns)" in said
    cache = api.data(*words)["cache"]
    plan = api.compose(*words, here=True)
    folder = prepare.prepare_data(plan, api.open_tokenizer(plan)[0])
    assert str(folder) == cache["folder"] and stat.S_IMODE(folder.stat().st_mode) == 0o700
    stored = json.loads((folder / prepare.SAMPLES).read_text())["samples"]
    assert len(stored) == 5 and stored[0]["row"] == 1
    plan = plan.model_copy(update={"run_dir": str(here)})
    data = prepare.open_prepared(folder)
    training_run.link_data(plan, data)
    link = json.loads((here / run_directory.DATA).read_text())
    assert (link["key"], link["samples"]) == (folder.name, str(folder / prepare.SAMPLES))
    train = link["splits"]["train"]
    assert train["kept"] + sum(train["dropped"].values()) == train["read"] == 20


def test_no_samples_are_kept_where_none_are_wanted(here: Path, model: list[str]):
    write_rows(here / "good.jsonl", tiny.chat_rows(20))
    shown = api.data("good.jsonl", *model, "dataset.report_samples=0", samples=2)
    assert len(shown["samples"]) == 2 and not Path(shown["cache"]["folder"], prepare.SAMPLES).exists()


def test_refused_rows_are_reported_and_never_ready(here: Path, model: list[str]):
    shown = api.data("my.jsonl", *model)
    folder = Path(shown["cache"]["folder"])
    assert shown["refused"] and shown["splits"]["train"]["kept"] == 21 and shown["epoch"]["rows"] == 21
    assert not list(folder.glob("*.arrow")) and len(shown["samples"]) == 3
    plan = api.compose("my.jsonl", *model, "dataset.on_bad_row=drop", "dataset.max_bad_rows=0.5")
    refusing = plan.model_copy(update={"dataset": api.data_plan("my.jsonl", *model)[1]})
    tokenizer = api.open_tokenizer(plan)[0]
    for _ in range(2):
        with pytest.raises(KitError, match="cannot be trained on"):
            prepare.prepare_data(refusing, tokenizer)
    assert len(prepare.open_prepared(prepare.prepare_data(plan, tokenizer)).train) == 21


def test_one_row_by_the_number_that_bad_rows_are_told_with(here: Path, model: list[str], capsys):
    bad = api.data("my.jsonl")["splits"]["train"]["bad"][0]
    shown = api.data("my.jsonl", row=bad["row"])
    assert shown["refused"] and (shown["row"]["raw"], shown["row"]["problem"]) == (NO_ANSWER, bad["reason"])
    assert cli.run_verb(["data", "my.jsonl", *model, "dataset.train_on=assistant_turns", "--row", "2"]) == DONE
    said = capsys.readouterr().out
    row = api.data("my.jsonl", *model, "dataset.train_on=assistant_turns", row=2)["row"]
    trained = [token["text"] for token in row["tokens"] if token["trained"]]
    answer = tiny.chat_rows(2)[1]["messages"][1]["content"]
    assert " ".join(trained) == f"{answer} </s>" and "".join(text for text, on in row["pieces"] if on) in said
    assert said.count(" trained\n") == len(trained)


@pytest.mark.parametrize(
    ("words", "problem", "fix"),
    [
        (["my.jsonl", "--row", "99"], "has no row 99", "its last is 23"),
        (["my.jsonl", "--row", "0"], "no row 0", "from 1"),
        (["*.jsonl", "--row", "1"], "2 files", "--file with one of"),
        (["my.jsonl", "--row", "1", "--file", "none.jsonl"], "none.jsonl is none of the files", "my.jsonl"),
        (["my.jsonl", "--fix-out", "my.jsonl"], "is read", "another name"),
        (["my.jsonl", "--fix-out", "my.jsonl", "--overwrite"], "is read", "another name"),
        (["my.jsonl", "--fix-out", "other.jsonl"], "other.jsonl exists", "--overwrite"),
        (["my.jsonl", "--fix-out", "my.csv"], "JSON lines", ".jsonl"),
        (["my.jsonl", "--fix-out", "no/my.jsonl"], "no folder no", "make it"),
        (["my.jsonl", "dataset.limit=3", "--fix-out", "new.jsonl"], "only a part", "dataset.limit"),
        (["noise.jsonl"], "none of the first", "what its name says"),
        (["empty.jsonl"], "holds no rows", "at least one row"),
        (["my.jsnl.jsonl"], "there is no data file", "my.jsonl"),
        (["my.jsonl", "dataset.fromat=text"], "no key dataset.fromat", "dataset.format"),
        ([], "dataset.path is not given", "dataset.path="),
    ],
)
def test_refusals(here: Path, words: list[str], problem: str, fix: str, capsys: pytest.CaptureFixture[str]):
    write_rows(here / "other.jsonl", tiny.chat_rows(3))
    if words[:1] == ["noise.jsonl"]:
        (here / "noise.jsonl").write_bytes(random.Random(0).randbytes(3000))
    if words[:1] == ["empty.jsonl"]:
        (here / "empty.jsonl").write_bytes(b"")
    before = {p.name: p.read_bytes() for p in here.iterdir() if p.is_file()}
    assert cli.run_verb(["data", *words]) == REFUSED
    said = capsys.readouterr().err
    assert problem in said and fix in said
    assert {p.name: p.read_bytes() for p in here.iterdir() if p.is_file()} == before


@pytest.mark.parametrize("with_model", [False, True])
def test_the_good_rows_as_they_were(here: Path, model: list[str], with_model: bool):
    options = {"fix_out": "clean.jsonl"}
    made = api.data("my.jsonl", *(model if with_model else []), **options)["fix_out"]
    assert (made["kept"]["rows"], made["bad"]["rows"]) == (21, 2)
    lines = (here / "my.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in (here / "clean.jsonl").read_text().splitlines()]
    assert kept == [json.loads(line) for line in lines[:21]]
    bad = [json.loads(line) for line in (here / "clean.bad.jsonl").read_text().splitlines()]
    assert [(row["row"], row["data"]) for row in bad] == [(22, NO_ANSWER), (23, None)]
    assert all(row["reason"] and row["offset"] > 0 and row["file"].endswith("my.jsonl") for row in bad)
    assert not api.data("clean.jsonl")["refused"]
    assert api.data("my.jsonl", overwrite=True, **options)["fix_out"] == made


def test_a_terminal_only_shows_what_stands_in_a_row(here: Path, capsys: pytest.CaptureFixture[str]):
    write_rows(here / "evil.jsonl", [{"text": "a\x1b[31m\x9b2J b"}])
    assert cli.run_verb(["data", "evil.jsonl"]) == DONE and cli.run_verb(["data", "evil.jsonl", "--row", "1"]) == DONE
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\x9b" not in said and said.count("a\\u001b[31m") + said.count("a\\x1b[31m") >= 2


def test_a_model_whose_tokenizer_is_not_here(here: Path, capsys: pytest.CaptureFixture[str]):
    write_rows(here / "good.jsonl", tiny.chat_rows(20))
    assert cli.run_verb(["data", "good.jsonl", "model.name_or_path=no/such"]) == DONE
    assert "the tokenizer of no/such is not here; kit fetch" in capsys.readouterr().out


def test_the_bare_install_says_what_rendering_needs(here: Path, model: list[str], monkeypatch, capsys):
    monkeypatch.setattr(dependencies, "is_installed", lambda name: name != "trl")
    write_rows(here / "good.jsonl", tiny.chat_rows(20))
    assert cli.run_verb(["data", "good.jsonl", *model]) == DONE
    said = capsys.readouterr().out
    assert "20 rows kept + 0 left out" in said and "rows are not rendered: trl is not installed" in said


def test_rows_that_are_too_long_are_told_with_their_lengths(here: Path, model: list[str], capsys):
    write_rows(here / "long.jsonl", [{"text": tiny.sentence(1, n)} for n in (5, 80, 90)])
    assert cli.run_verb(["data", "long.jsonl", *model, "dataset.on_long_row=refuse"]) == REFUSED
    said = capsys.readouterr()
    assert "long       2: it has N tokens, more than max_length=N" in said.out and "has 81 tokens" in said.out
    assert "dataset.on_long_row=truncate|split|drop" in said.err


def test_padding_is_that_of_trl_and_of_batches():
    draw = random.Random(1)
    lengths = Counter(draw.choice([3, 9, 20, 33, 64, *range(1, 30)]) for _ in range(500))
    from datasets import Dataset
    from trl import pack_dataset

    rows = Dataset.from_list([{"input_ids": [1] * n} for n, count in lengths.items() for _ in range(count)])
    packed = len(pack_dataset(rows, 64, "bfd"))
    tokens = sum(n * count for n, count in lengths.items())
    assert preview.packed_pad_share(dict(lengths), 64, None) == round(1 - tokens / (64 * packed), 4)
    assert preview.packed_pad_share(dict(lengths), 64, packed) == round(1 - tokens / (64 * packed), 4)
    assert preview.pad_share({7: 100}, 8, 0, False) == 0 and preview.pad_share({}, 8, 0, False) is None
    mixed = {10: 500, 30: 500}
    assert preview.pad_share(mixed, 1, 0, False) == 0
    assert preview.pad_share(mixed, 2, 0, False) == pytest.approx(0.2, abs=0.03)  # half the pairs: 40 of 60
    assert preview.pad_share(mixed, 2, 0, True) < 0.02


def test_text_is_counted_by_the_width_of_its_letters():
    assert prepare.measure_text({"text": "abcd"}, 2) == {
        "narrow_rows": 1,
        "narrow_bytes": 4,
        "narrow_characters": 4,
        "narrow_tokens": 2,
    }
    chat = {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "很好"}]}
    assert prepare.measure_text(chat, 9)["wide_bytes"] == 12 and prepare.measure_text(chat, 9)["wide_characters"] == 4
    assert prepare.measure_text({"input_ids": [1]}, 1) == {}


def test_progress_away_from_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.05)
    with terminal.show_progress("train", "rows", 20_000, lambda: 12_000):
        time.sleep(0.2)
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("train: 12,000 of 20,000 rows, ") and line.endswith(" rows/s")


def test_a_file_that_breaks_off_is_refused_whatever_is_dropped(here, capsys):
    """Without a model too: nobody knows how many rows are lost."""
    packed = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in tiny.chat_rows(4000)))
    (here / "torn.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    assert cli.run_verb(["data", "torn.jsonl.gz", "dataset.on_bad_row=drop"]) == REFUSED
    assert "breaks off after row" in "".join(capsys.readouterr())
