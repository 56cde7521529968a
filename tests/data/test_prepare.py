"""One pass over all rows: what is kept, dropped, refused and counted, what is cached, and that packing is TRL's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import tiny
from conftest import write_rows
from test_generate import make_tokenizer

from kit import api
from kit.config import plan as plan_module
from kit.data import prepare
from kit.data.encode import IGNORED
from kit.errors import KitError
from kit.models.load import load_tokenizer
from kit.schema.run_plan import RunPlan
from kit.system import hardware

W = tiny.WORDS  # the tokenizer knows these words alone


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "data"


@pytest.fixture
def plan_of(base: Path, tmp_path: Path):
    def make(*overrides: str, data: list[dict] | None = None) -> RunPlan:
        given = {o.partition("=")[0] for o in overrides}
        stock = [] if "model.name_or_path" in given else [f"model.name_or_path={base}"]
        stock += [] if "trainer.max_length" in given else ["trainer.max_length=64"]
        if not given & {"dataset.path", "dataset.mix"}:
            stock.append(
                f"dataset.path={write_rows(tmp_path / 'rows.jsonl', tiny.chat_rows() if data is None else data)}"
            )
        return api.compose(*stock, "trainer.use_cpu=true", *overrides)

    return make


def prepared(plan: RunPlan) -> prepare.PreparedData:
    return prepare.open_prepared(prepare.prepare_data(plan, load_tokenizer(plan)))


@pytest.fixture
def prepare_of(plan_of):
    return lambda *overrides, **given: prepared(plan_of(*overrides, **given))


@pytest.fixture
def refusal(plan_of):
    """The problems for which the pass refuses a run; the check has to let it pass."""

    def of(*overrides: str, **given):
        plan = plan_of(*overrides, **given)
        with pytest.raises(KitError) as refused:
            prepared(plan)
        assert refused.value.code == 2 and all(p.rule == "bad-rows" and p.fix for p in refused.value.problems)
        return refused.value.problems

    return of


def chat(question: str, answer: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def late(rows: list[dict], good: int = 210) -> list[dict]:
    """Rows behind so many good ones that the check, which looks at the first, does not see them."""
    return [*(chat(tiny.sentence(n, 5), tiny.sentence(n + 1, 4)) for n in range(good)), *rows]


def decoded(base: Path, row: dict) -> tuple[str, str]:
    """(the row, what of it is in the loss) as text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    kept = [i for i in row["labels"] if i != IGNORED]
    assert all(label in (IGNORED, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(kept)


def splits(data: prepare.PreparedData) -> dict:
    return data.report["splits"]


# ---- every format ----

TURNS = "<|user|> has pain <|assistant|> "
FORMATS = {
    "messages": ({"messages": [{"role": "user", "content": "has pain"}, {"role": "assistant", "content": "rest"}]},
                 TURNS + "rest </s>", "assistant_turns", "rest </s>"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "has pain"}, {"from": "gpt", "value": "rest"}]},
                 TURNS + "rest </s>", "assistant_turns", "rest </s>"),
    "alpaca": ({"instruction": "has", "input": "pain", "output": "rest"},
               "<|user|> has pain <|assistant|> rest </s>", "last_turn", "rest </s>"),
    "alpaca_prompt": ({"instruction": "has pain", "input": "", "output": " rest"}, None, "completion", "rest </s>"),
    "prompt_completion": ({"prompt": "has pain", "completion": " rest"}, "has pain rest </s>", None, "rest </s>"),
    "question_answer": ({"question": "has pain", "answer": "rest"}, TURNS + "rest </s>", None, TURNS + "rest </s>"),
    "text": ({"text": "has pain rest"}, "has pain rest </s>", None, "has pain rest </s>"),
    "tokenized": ({"input_ids": [8, 9, 2], "labels": [-100, 9, 2]}, "a patient </s>", None, "patient </s>"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_from_file_to_labels(name, plan_of, base):
    row, text, train_on, trained = FORMATS[name]
    chosen = [f"dataset.train_on={train_on}"] if train_on else []
    chosen += ["dataset.format=alpaca_prompt"] if name == "alpaca_prompt" else []
    plan = plan_of(*chosen, data=[row] * 3)
    assert plan.dataset.format == name
    data = prepared(plan)
    assert len(data.train) == 3 and set(data.train.column_names) == {"input_ids", "labels", "length"}
    found = decoded(base, data.train[0])
    assert (text is None or found[0] == text) and found[1] == trained
    part = splits(data)["train"]
    assert (part["read"], part["kept"], part["rows"], part["duplicates"], part["dropped"]) == (3, 3, 3, 2, {})
    assert part["tokens"] == 3 * len(data.train[0]["input_ids"]) == 3 * data.train[0]["length"] and part[
        "sources"
    ] == {"0": 3}


def test_roles_that_are_named(prepare_of, base):
    rows = [{"turns": [{"from": "Patient", "value": "has pain"}, {"from": "Doctor", "value": "rest"}]}] * 2
    data = prepare_of("dataset.roles.Patient=user", "dataset.roles.Doctor=assistant", data=rows)
    assert decoded(base, data.train[0])[0] == TURNS + "rest </s>"


# ---- bad rows ----

BAD = [
    chat("a", "b") | {"messages": [{"role": "narrator", "content": "a"}]},
    {"messages": [{"role": "user", "content": "has pain"}]},
    {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "rest"}]},
    {"text": "no chat"},
]
REASONS = ["the role 'narrator' is not known", "has no assistant turn to train", "turn 1: has no content",
           "has the columns text; the format is messages"]  # fmt: skip


def test_bad_rows_are_refused_with_file_row_and_reason_all_at_once(refusal, tmp_path):
    problems = refusal(data=late([*BAD, BAD[0]]))
    assert len(problems) == 4 and all(p.where == "dataset.on_bad_row" for p in problems)
    for problem, reason, number in zip(problems, REASONS, (211, 212, 213, 214), strict=True):
        assert f"{tmp_path / 'rows.jsonl'} row {number}: " in problem.problem and reason in problem.problem
    assert problems[0].problem.startswith("2 of 215 rows of train cannot be trained on") and "row 215" in str(problems)


def test_many_bad_rows_are_counted_and_three_named(refusal):
    [problem] = refusal(data=late([BAD[1]] * 9))
    assert (
        "9 of 219 rows" in problem.problem and problem.problem.count(" row 21") == 3 and "and 6 more" in str(problem)
    )


def test_kept_and_dropped_are_what_was_read(prepare_of):
    data = prepare_of("dataset.on_bad_row=drop", "dataset.max_bad_rows=5", data=late([*BAD, BAD[1]]))
    part = splits(data)["train"]
    assert (part["read"], part["kept"], len(data.train)) == (215, 210, 210)
    assert part["kept"] + sum(part["dropped"].values()) == part["read"] and len(part["dropped"]) == 4
    assert part["kinds"] == {"bad": 5}
    [line] = [note for note in data.notes if "dropped" in note]
    assert line.startswith("train: 210 kept + 5 dropped = 215 read: has no assistant turn to train (2); ")


def test_bad_rows_lie_beside_what_was_kept_in_their_order(plan_of):
    plan = plan_of("dataset.on_bad_row=drop", "dataset.max_bad_rows=0.5", data=late(BAD))
    folder = prepare.prepare_data(plan, load_tokenizer(plan))
    bad = [json.loads(line) for line in (folder / "train-bad_rows.jsonl").read_text().splitlines()]
    assert [b["number"] for b in bad] == [211, 212, 213, 214] and all(b["offset"] > 0 for b in bad)


def test_more_than_the_cap_are_refused(refusal, prepare_of):
    problems = refusal("dataset.on_bad_row=drop", data=late(BAD))
    assert len(problems) == 4 and "dataset.max_bad_rows=4 (now 0.01)" in problems[0].fix
    assert len(refusal("dataset.on_bad_row=drop", "dataset.max_bad_rows=3", data=late(BAD))) == 4
    advised = problems[0].fix.split()[3]
    assert len(prepare_of("dataset.on_bad_row=drop", advised, data=late(BAD)).train) == 210, "what is advised helps"


def test_empty_answers_are_dropped_and_said(prepare_of):
    """Public sets have a few: nothing is in them to learn, and nothing is wrong with the file."""
    rows = [{"question": "has pain", "answer": answer} for answer in ("rest", "", "  ", None)]
    data = prepare_of(data=rows)
    assert splits(data)["train"]["kinds"] == {"empty": 3}
    assert "train: 1 kept + 3 dropped = 4 read: the answer is empty (3)" in data.notes


def test_nothing_left_is_refused(refusal):
    [problem] = refusal("dataset.on_bad_row=drop", "dataset.max_bad_rows=3", "dataset.train_on=chosen_turns",
                        data=[chat("a", "rest")] * 3)  # fmt: skip
    assert "none of the 3 rows of train can be trained on" in problem.problem


def test_what_a_damaged_file_lost_is_refused_where_bad_rows_are_dropped(refusal, tmp_path, plan_of):
    """The row stands for all behind it: it is not one of a few."""
    import gzip

    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in late([], 4000)).encode(), mtime=0)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) * 2 // 3])
    [problem] = refusal(f"dataset.path={tmp_path / 'cut.jsonl.gz'}", "dataset.on_bad_row=drop")
    assert "the file breaks off after row" in problem.problem and problem.where == "dataset.path"
    assert "drop" not in problem.fix
    line = json.dumps(chat("a", "b")).encode() + b"\n"
    (tmp_path / "short.jsonl.gz").write_bytes(gzip.compress(line * 9, mtime=0)[:-4])
    with pytest.raises(KitError, match="breaks off after row 9"):  # among the first rows the check says so
        plan_of(f"dataset.path={tmp_path / 'short.jsonl.gz'}", "dataset.on_bad_row=drop")


# ---- long rows ----

LONG = [chat("has pain", " ".join(W[:30])), chat("has pain", "rest"), chat(" ".join(W), "rest")]


def test_long_rows_are_cut_and_said(prepare_of, base):
    data = prepare_of(
        "trainer.max_length=10", "dataset.train_on=assistant_turns", "dataset.max_bad_rows=0.5", data=LONG
    )
    part = splits(data)["train"]
    assert (part["read"], part["kept"], part["notes"]) == (3, 2, {"cut": 1}) and part["kinds"] == {"long": 1}
    assert [len(ids) for ids in data.train["input_ids"]] == [10, 6]
    assert "train: 1 rows: cut" in data.notes and any("no trained token is left" in note for note in data.notes)


def test_a_row_cut_out_of_the_loss_is_refused_by_default(refusal):
    [problem] = refusal("trainer.max_length=10", "dataset.train_on=assistant_turns", data=LONG)
    assert "row 3: no trained token is left of its" in problem.problem and problem.where == "trainer.max_length"


def test_the_end_can_be_kept(prepare_of, base):
    data = prepare_of("trainer.max_length=10", "trainer.truncation_mode=keep_end", data=LONG)
    assert [decoded(base, row)[0].endswith("</s>") for row in data.train] == [True] * 3


def test_long_rows_are_split(prepare_of):
    whole = prepare_of("trainer.max_length=64", data=LONG)
    data = prepare_of("trainer.max_length=10", "dataset.on_long_row=split", data=LONG)
    lengths = [len(ids) for ids in whole.train["input_ids"]]
    assert len(data.train) == sum(-(-n // 10) for n in lengths) == splits(data)["train"]["rows"]
    assert sum(data.train["input_ids"], []) == sum(whole.train["input_ids"], [])
    assert splits(data)["train"]["kept"] == 3 and splits(data)["train"]["notes"] == {"split": 2}


def test_long_rows_are_dropped_or_refused(prepare_of, refusal):
    data = prepare_of("trainer.max_length=10", "dataset.on_long_row=drop", "dataset.max_bad_rows=2", data=LONG)
    assert len(data.train) == 1 and splits(data)["train"]["dropped"] == {"it has N tokens, more than max_length=N": 2}
    for chosen in (["dataset.on_long_row=refuse"], ["dataset.on_long_row=drop"]):
        [problem] = refusal("trainer.max_length=10", *chosen, data=LONG)
        assert "row 1" in problem.problem and "row 3" in problem.problem and "max_length=10" in problem.problem


def test_an_end_that_is_never_learned_is_said(prepare_of):
    rows = [{"input_ids": [8, 9, 2], "labels": [-100, 9, -100]}, {"input_ids": [8, 9, 2]}]
    data = prepare_of(data=rows)
    assert splits(data)["train"]["no_end"] == 1 and "1 rows have no end token in the loss" in "".join(data.notes)


# ---- parts and mixtures ----


def test_limits_and_parts(prepare_of, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", tiny.chat_rows(20))
    data = prepare_of("dataset.limit=7", f"dataset.eval_path={other}", "dataset.eval_limit=3")
    assert (len(data.train), len(data.validation), data.test is data.validation) == (7, 3, True)
    data = prepare_of("dataset.test_size=0.25", "dataset.validation_size=0.25")
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 6, 6)
    held = {json.dumps(ids) for part in (data.validation, data.test) for ids in part["input_ids"]}
    assert not held & {json.dumps(ids) for ids in data.train["input_ids"]}


@pytest.fixture
def mixed(tmp_path):
    a = write_rows(tmp_path / "a.jsonl", [{"text": tiny.sentence(n, 6)} for n in range(400)])
    b = write_rows(tmp_path / "b.csv", [])
    b.write_text("question,answer\n" + "".join(f"{tiny.sentence(n, 4)},{tiny.sentence(n, 3)}\n" for n in range(100)))
    return a, b


def test_sets_of_different_formats_are_counted_each(prepare_of, mixed, base):
    a, b = mixed
    data = prepare_of(f"dataset.mix=[{{path: '{a}', limit: 30}}, {{path: '{b}'}}]")
    assert splits(data)["train"]["sources"] == {"1": 100, "0": 30}
    assert "<|user|>" not in decoded(base, data.train[29])[0] and "<|user|>" in decoded(base, data.train[30])[0]


def test_weights_are_shares(prepare_of, mixed):
    a, b = mixed
    sets = f"dataset.mix=[{{path: '{a}', weight: 7}}, {{path: '{b}', weight: 3}}]"
    counts = splits(prepare_of(sets))["train"]["sources"]
    assert counts["1"] == 100 and abs(counts["0"] / (counts["0"] + 100) - 0.7) < 0.06  # until the first is used up
    counts = splits(prepare_of(sets, "dataset.mix_until=all_exhausted"))["train"]["sources"]
    assert counts["0"] >= 400 and abs(counts["0"] / (counts["0"] + counts["1"]) - 0.7) < 0.06


# ---- the cache ----


def built(plan: RunPlan) -> Path:
    return prepare.prepare_data(plan, load_tokenizer(plan))


def test_a_second_time_there_is_nothing_to_do(plan_of, monkeypatch):
    plan = plan_of()
    tokenizer = load_tokenizer(plan)
    folder = prepare.prepare_data(plan, tokenizer)
    before = {f.name: f.stat().st_mtime_ns for f in folder.iterdir() if f.name != prepare.REPORT}
    monkeypatch.setattr(prepare, "build", None)
    started = time.perf_counter()
    assert prepare.prepare_data(plan, tokenizer) == folder and len(prepare.open_prepared(folder).train) == 24
    assert time.perf_counter() - started < 1
    after = {f.name: f.stat().st_mtime_ns for f in folder.iterdir() if f.name != prepare.REPORT}
    assert after == before  # the report's time is when it was last asked for


CHANGES = [
    ["trainer.max_length=32"], ["trainer.packing=true"], ["dataset.train_on=assistant_turns"], ["dataset.limit=5"],
    ["trainer.assistant_only_loss=true"], ["dataset.on_long_row=split"], ["tokenizer.chat_template=llama3"],
    ["tokenizer.eos_token='<unk>'"], ["tokenizer.date=2026-01-02"], ["dataset.test_size=0.25"],
    ["tokenizer.added_tokens=['<new>']"],
]  # fmt: skip


def test_the_key_holds_what_the_rows_depend_on(plan_of):
    folders = [built(plan_of())]
    folders += [built(plan_of(*change)) for change in CHANGES]
    assert len(set(folders)) == len(folders), folders
    same = [["dataset.report_samples=0"], ["trainer.learning_rate=1e-3"], ["trainer.dataset_num_proc=2"],
            ["trainer.per_device_train_batch_size=2"]]  # fmt: skip
    assert {built(plan_of(*change)) for change in same} == {folders[0]}


def test_a_file_that_changed_is_read_again(plan_of, tmp_path):
    plan = plan_of()
    first = built(plan)
    file = tmp_path / "rows.jsonl"
    changed = file.read_text().replace("fever", "cough", 1) if "fever" in file.read_text() else None
    assert changed and len(changed) == file.stat().st_size
    file.write_text(changed)
    assert built(plan) != first
    moved = file.rename(tmp_path / "moved.jsonl")  # the same under another name: read again too
    assert built(plan_of(f"dataset.path={moved}")) != first


def test_a_build_that_is_killed_leaves_nothing_ready(plan_of, cache):
    plan = plan_of()
    tokenizer = load_tokenizer(plan)

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    def child(monkeypatch):
        monkeypatch.setattr(prepare, "refuse_rows", die)
        prepare.prepare_data(plan, tokenizer)

    assert os.WTERMSIG(fork(child)) == signal.SIGKILL
    [left] = [f for f in cache.iterdir() if f.is_dir()]
    assert ".staging-" in left.name and not (left / prepare.REPORT).exists()
    folder = prepare.prepare_data(plan, tokenizer)
    assert len(prepare.open_prepared(folder).train) == 24 and not left.exists()
    assert not [f for f in folder.rglob("*") if f.name.startswith((".raw-", ".owner"))]


def fork(work) -> int:
    """Run `work` in a process of its own and return how it ended."""
    process = start(work)
    return os.waitpid(process, 0)[1]


def start(work) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            work(monkeypatch)
        code = 0
    finally:
        os._exit(code)


def test_two_processes_build_the_same_at_once(plan_of, tmp_path, cache):
    plan = plan_of()
    tokenizer = load_tokenizer(plan)
    build = prepare.build

    def child(monkeypatch):
        def together(*args):
            (tmp_path / f"ready-{os.getpid()}").touch()
            while len(list(tmp_path.glob("ready-*"))) < 2:
                time.sleep(0.01)
            return build(*args)

        monkeypatch.setattr(prepare, "build", together)
        folder = prepare.prepare_data(plan, tokenizer)
        assert prepare.open_prepared(folder).train["input_ids"][:] and len(prepare.open_prepared(folder).train) == 24

    assert [os.waitpid(p, 0)[1] for p in (start(child), start(child))] == [0, 0]
    assert len([f for f in cache.iterdir() if f.is_dir()]) == 1
    assert len(prepared(plan).train) == 24


def test_what_stands_finished_stays(tmp_path):
    ready, late_one = tmp_path / "ready", tmp_path / "ready.staging-1"
    for folder in (ready, late_one):
        folder.mkdir()
        (folder / prepare.REPORT).write_text(folder.name)
    prepare.keep_finished(late_one, ready)
    assert (ready / prepare.REPORT).read_text() == "ready" and late_one.exists()
    (ready / prepare.REPORT).rename(ready / "other")
    prepare.keep_finished(late_one, ready)
    assert (ready / prepare.REPORT).read_text() == "ready.staging-1"


def test_a_file_that_was_cut_off_is_not_trained_on(plan_of):
    """Arrow's stream reader takes a file that ends between two batches for a whole one."""
    folder = built(plan_of("trainer.packing=false", data=tiny.chat_rows(2500)))
    file = folder / "train.arrow"
    import pyarrow

    with pyarrow.OSFile(str(file)) as source, pyarrow.ipc.open_stream(source) as reader:
        batches = list(reader)
        assert len(batches) > 1
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, batches[0].schema) as writer:
        writer.write_batch(batches[0])
    with pytest.raises(KitError, match="are not whole"):
        prepare.open_prepared(folder)


# ---- nothing depends on where a row stands, or on how many read ----


def test_one_process_and_two_make_equal_rows(prepare_of, cache):
    rows = late([*BAD, *tiny.chat_rows(300)])
    chosen = ("dataset.on_bad_row=drop", "dataset.max_bad_rows=9")
    one = prepare_of(*chosen, "trainer.dataset_num_proc=1", data=rows)
    counts = one.report
    ids, labels = one.train["input_ids"][:], one.train["labels"][:]
    shutil.rmtree(cache)
    two = prepare_of(*chosen, "trainer.dataset_num_proc=2", data=rows)
    assert two.train["input_ids"][:] == ids and two.train["labels"][:] == labels
    for part in (counts["splits"]["train"], two.report["splits"]["train"]):
        del part["files"]
    assert counts == two.report


ODD = [
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "has pain"}]},
                  {"role": "assistant", "content": "rest", "weight": 1, "name": "doctor"}], "tools": None},
    chat("a patient", "drink water", chat_template_kwargs={"week": {"a": [1, None]}}),
    {"messages": [{"role": "user", "content": "no fever"}, {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "help", "arguments": "{\"day\": {\"a\": 1}}"}}]},
        {"role": "tool", "content": "yes"}, {"role": "assistant", "content": "rest"}]},
]  # fmt: skip


@pytest.mark.parametrize("place", ["first", "middle", "after 10 MB"])
def test_an_odd_row_is_the_same_wherever_it_stands(place, base, tmp_path):
    """Keys and types first seen late, beside rows with another shape: as if it stood alone."""
    model = Path(shutil.copytree(base, tmp_path / "model"))
    template = tiny.TEMPLATE.replace(
        "{% generation %}", "{% generation %}{% for c in message.tool_calls or [] %}{{ c.function.name }} "
        "{{ c.function.arguments | tojson }} {% endfor %}")  # fmt: skip
    (model / "chat_template.jinja").write_text(template)
    plain = [chat(tiny.sentence(n, 4), "rest", note="x" * 1_000_000 if place == "after 10 MB" else "x")
             for n in range(12)]  # fmt: skip
    rows = {"first": [*ODD, *plain], "middle": [*plain[:6], *ODD, *plain[6:]], "after 10 MB": [*plain, *ODD]}[place]
    at = rows.index(ODD[0])

    def tokens(name: str, these: list[dict]) -> list:
        file = write_rows(tmp_path / name, these)
        plan = api.compose(f"model.name_or_path={model}", f"dataset.path={file}", "trainer.max_length=64")
        return prepared(plan).train[:]["input_ids"]

    alone = [tokens(f"odd{n}.jsonl", [row])[0] for n, row in enumerate(ODD)]
    assert tokens("all.jsonl", rows)[at : at + len(ODD)] == alone


# ---- packing ----


def documents(packed) -> list[list[int]]:
    rows = zip(packed["input_ids"], packed["seq_lengths"], strict=True)
    return [ids[sum(lengths[:n]) :][: lengths[n]] for ids, lengths in rows for n in range(len(lengths))]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", None])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_rows_are_those_of_trl(kind, strategy, shuffled, prepare_of, base, tmp_path):
    """Order, ids, labels and the lengths of the documents."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = tiny.text_rows(80) if kind == "text" else tiny.chat_rows(80)
    settings = {"packing": strategy is not None, "shuffle_dataset": shuffled, "max_length": 12, "seed": 5}
    settings |= {"packing_strategy": strategy} if strategy else {}
    ours = prepare_of(*(f"trainer.{key}={value}" for key, value in settings.items()), data=rows)
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], padding_free=False, **settings)
    theirs = SFTTrainer(AutoModelForCausalLM.from_pretrained(base), args, train_dataset=tiny.dataset(rows),
                        processing_class=AutoTokenizer.from_pretrained(base)).train_dataset  # fmt: skip
    if strategy == "bfd_split" and shuffled:  # the pieces are shuffled here, the documents there
        assert sorted(documents(ours.train)) == sorted(documents(theirs))
        return
    assert ours.train["input_ids"][:] == theirs["input_ids"][:]
    labels = theirs["labels"][:] if "labels" in theirs.column_names else theirs["input_ids"][:]
    assert ours.train["labels"][:] == labels
    if strategy is None:
        return
    assert ours.train["seq_lengths"][:] == theirs["seq_lengths"][:]
    part = splits(ours)["train"]
    assert part["packed"] == len(ours.train) and sum(map(len, ours.train["seq_lengths"])) == part["rows"]
    assert f"documents packed into {part['packed']:,} rows" in "".join(ours.notes)


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.assistant_only_loss=true"],
        ["trainer.assistant_only_loss=true", "trainer.packing=true"],
        ["dataset.train_on=last_turn", "tokenizer.pad_token='</s>'"],
        ["trainer.completion_only_loss=true"],
        ["trainer.train_sampling_strategy=group_by_length"],
        [],
    ],
    ids=str,
)
def test_the_trainer_is_given_these_tokens_and_these_labels(overrides, plan_of, base):
    """Through SFTTrainer's collator, whatever the plan's settings mean to it: all tokens, and the loss on ours alone."""
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig

    from kit.training.run import sft_config_arguments
    from kit.training.trainer import ModifiedTrainer

    data = tiny.prompt_rows() if "completion" in str(overrides) else tiny.chat_rows()
    plan = plan_of("trainer.bf16=false", "deepspeed=none", "launch.num_gpus=1", *overrides, data=data)
    found, part = prepared(plan), None
    part = splits(found)["train"]
    trainer = ModifiedTrainer(AutoModelForCausalLM.from_pretrained(base), SFTConfig(**sft_config_arguments(plan)),
                              train_dataset=found.train, processing_class=load_tokenizer(plan))  # fmt: skip
    batches = list(trainer.get_train_dataloader())
    trained = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    packed = "trainer.packing=true" in overrides
    assert trained == part["trained"]
    if packed:
        assert sum(batch["input_ids"].numel() for batch in batches) == part["tokens"]
    else:
        assert sum(int(batch["attention_mask"].sum()) for batch in batches) == part["tokens"]


def test_evaluation_is_packed_by_its_own_setting(prepare_of):
    data = prepare_of("trainer.packing=true", "trainer.eval_packing=false", "dataset.test_size=0.25")
    assert "seq_lengths" in data.train.column_names and "seq_lengths" not in data.test.column_names


# ---- a template that writes the date ----

DATED = "{{ strftime_now('%d %b %Y') }}\n"


@pytest.fixture
def dated(base, tmp_path) -> Path:
    """The tiny model with a tokenizer of bytes whose template begins with today's date, as Llama 3.2's does."""
    folder = Path(shutil.copytree(base, tmp_path / "dated"))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DATED + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 320}))
    return folder


class Calendar:
    """Stands in for datetime.date and datetime.datetime: on a day of ours."""

    def __init__(self, day: str) -> None:
        import datetime

        self.day = datetime.datetime.fromisoformat(day)

    def today(self):
        return self.day.date()

    def now(self):
        return self.day


def test_the_date_is_the_plans(plan_of, dated, monkeypatch, tmp_path):
    from transformers.utils import chat_template_utils

    def on(day: str) -> None:
        monkeypatch.setattr(plan_module, "date", Calendar(day))
        monkeypatch.setattr(chat_template_utils, "datetime", Calendar(day))

    on("2026-01-02")
    plan = plan_of(f"model.name_or_path={dated}", "trainer.max_length=128")
    assert plan.tokenizer.date == "2026-01-02"
    first = built(plan)
    text = load_tokenizer(plan).decode(prepare.open_prepared(first).train[0]["input_ids"])
    assert text.startswith("02 Jan 2026\n<|im_start|>user")

    on("2026-03-04")
    assert built(plan) == first, "the same tomorrow"
    resumed = api.override_plan(plan, ["trainer.logging_steps=3"])
    assert resumed.tokenizer.date == "2026-01-02" and built(resumed) == first
    other = plan_of(f"model.name_or_path={dated}", "trainer.max_length=128")
    assert other.tokenizer.date == "2026-03-04" and other.hash == plan.hash and built(other) != first
    chosen = plan_of(f"model.name_or_path={dated}", "trainer.max_length=128", "tokenizer.date=2026-01-02")
    assert chosen.tokenizer.date == "2026-01-02" and built(chosen) == first
    assert plan_of().tokenizer.date is None, "a template without a date has none"


# ---- what the plan says of it ----


@pytest.mark.parametrize(
    ("overrides", "rows", "train_on"),
    [
        ([], tiny.chat_rows(3), "everything"),
        (["trainer.assistant_only_loss=true"], tiny.chat_rows(3), "assistant_turns"),
        (["dataset.train_on=last_turn"], tiny.chat_rows(3), "last_turn"),
        ([], tiny.prompt_rows(3), "completion"),
        (["trainer.completion_only_loss=false"], tiny.prompt_rows(3), "everything"),
        ([], tiny.text_rows(3), "everything"),
    ],
)
def test_the_plan_says_what_is_trained(overrides, rows, train_on, plan_of):
    assert plan_of(*overrides, data=rows).train_on == train_on


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        (["dataset.train_on=everything", "trainer.assistant_only_loss=true"], tiny.chat_rows(3)),
        (["dataset.train_on=assistant_turns", "trainer.assistant_only_loss=false"], tiny.chat_rows(3)),
        (["dataset.train_on=everything", "trainer.completion_only_loss=true"], tiny.prompt_rows(3)),
        (["dataset.train_on=completion", "trainer.completion_only_loss=false"], tiny.prompt_rows(3)),
        (["dataset.train_on=last_turn"], tiny.text_rows(3)),
        (["dataset.train_on=completion"], tiny.chat_rows(3)),
        (["trainer.assistant_only_loss=true"], tiny.text_rows(3)),
        (["trainer.completion_only_loss=true"], tiny.chat_rows(3)),
    ],
)
def test_contradictions_are_refused(overrides, rows, plan_of):
    with pytest.raises(KitError) as refused:
        plan_of(*overrides, data=rows)
    assert {p.rule for p in refused.value.problems} == {"loss-mask-format"} and all(
        p.fix for p in refused.value.problems
    )


OLD = {  # names of runs as they were before rows were prepared here: a run goes on under the name that it has
    "72204a82": ["dataset.format=text"],
    "e9b2af7e": ["dataset.format=messages", "trainer.assistant_only_loss=true", "dataset.test_size=0.1"],
    "c0da4bcc": ["dataset.format=text", "dataset.split='train[:10%]'", "dataset.limit=5", "tokenizer.pad_token=x"],
    "a29fd12f": ["dataset.template.prompt='{a}'", "dataset.template.completion='{b}'", "dataset.streaming=true",
                 "trainer.max_steps=5", "dataset.eval_path=some/other"],
    "224d5d1e": ["dataset.columns.text=body", "dataset.format=text", "peft=none"],
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_old_runs_keep_their_names(name, monkeypatch):
    monkeypatch.setattr(hardware, "cpu_has_bf16_matmul", lambda: True)  # as on the machine where they were named
    model = ["model.name_or_path=some/llama", "trainer.use_cpu=true", "launch.num_gpus=1",
             "model.config={model_type: llama, hidden_size: 64, max_position_embeddings: 4096}"]  # fmt: skip
    assert api.compose(*model, "dataset.path=some/data", *OLD[name], here=False).hash == name
