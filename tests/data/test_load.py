"""From files to raw rows: templates over foreign columns, parts, mixtures, held-out rows, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import write_rows

from kit import api
from kit.data import load
from kit.data.load import open_sources, read_splits
from kit.errors import KitError
from kit.inspection import row_template
from kit.rows.turns import EmptyAnswer

DOCTOR = "Description: {Description} Patient: {Patient} Doctor: {Doctor}"


def rows(n: int = 100) -> list[dict]:
    return [{"Description": f"d{i}", "Patient": f"p{i} {{x}}", "Doctor": f"a{i}"} for i in range(n)]


@pytest.fixture
def plan_of(base, tmp_path):
    def make(*overrides: str, data: list[dict] | None = None):
        path = write_rows(tmp_path / "rows.jsonl", rows() if data is None else data)
        given = {o.partition("=")[0] for o in overrides}
        stock = [f"model.name_or_path={base}", f"runs_dir={tmp_path}"]
        stock += [] if given & {"dataset.path", "dataset.mix"} else [f"dataset.path={path}"]
        return api.compose(*stock, *overrides, here=True)

    return make


@pytest.fixture
def splits_of(plan_of, tmp_path):
    """The splits of a run with these overrides."""

    def read(*overrides: str, **given):
        d = plan_of(*overrides, **given).dataset
        return read_splits(d, *open_sources(d), tmp_path / f"raw-{len(list(tmp_path.glob('raw-*')))}")

    return read


def texts(part: load.RawRows, column: str = "text") -> list[str]:
    return [part[n][column] for n in range(len(part))]


# ---- rows written from columns ----


def test_text_written_from_columns(splits_of, plan_of):
    assert plan_of(f"dataset.template.text='{DOCTOR}'").dataset.format == "text"
    train = splits_of(f"dataset.template.text='{DOCTOR}'").train
    assert train[3] == {"text": "Description: d3 Patient: p3 {x} Doctor: a3"}


def test_prompt_completion_and_chat(splits_of, plan_of):
    train = splits_of("dataset.template.prompt='Q: {Patient}'", "dataset.template.completion=' {Doctor}'").train
    assert train[0] == {"prompt": "Q: p0 {x}", "completion": " a0"}
    chat = ("dataset.template.user='{Description}\n{Patient}'", "dataset.template.assistant='{Doctor}'",
            "dataset.template.system='Be short. {{ok}}'")  # fmt: skip
    assert plan_of(*chat).dataset.format == "messages"
    assert splits_of(*chat).train[1]["messages"] == [
        {"role": "system", "content": "Be short. {ok}"},
        {"role": "user", "content": "d1\np1 {x}"},
        {"role": "assistant", "content": "a1"},
    ]


def test_chat_with_the_answer_apart(splits_of):
    train = splits_of("dataset.template.user='{Patient}'", "dataset.template.assistant='{Doctor}'",
                      "dataset.format=prompt_completion").train  # fmt: skip
    assert train[0] == {"prompt": [{"role": "user", "content": "p0 {x}"}],
                        "completion": [{"role": "assistant", "content": "a0"}]}  # fmt: skip


def test_a_column_may_keep_its_name(splits_of):
    train = splits_of("dataset.template.text='<{text}>'", data=[{"text": "a"}, {"text": "b"}]).train
    assert texts(train) == ["<a>", "<b>"]


def test_a_row_without_an_answer_says_so(splits_of):
    data = rows(10)
    data[2]["Doctor"], data[5]["Doctor"], data[7]["Patient"] = " \n", None, None
    train = splits_of("dataset.template.prompt='{Patient}'", "dataset.template.completion='{Doctor}'", data=data).train
    for number in (2, 5):
        with pytest.raises(EmptyAnswer):
            train[number]
    assert train[7] == {"prompt": "", "completion": "a7"}  # a null is an empty text, not "None"


# ---- parts ----


def test_the_held_out_parts_are_those_of_two_splits_in_a_row(splits_of):
    """Rows of `train_test_split(0.2, seed=42)` and then of `train_test_split(0.5, seed=42)`."""
    from datasets import Dataset

    sizes = ("dataset.template.text='{Doctor}'", "dataset.test_size=0.1", "dataset.validation_size=0.1")
    found = splits_of(*sizes)
    first = Dataset.from_list(rows()).train_test_split(test_size=0.2, seed=42)
    second = first["test"].train_test_split(test_size=0.5, seed=42)
    assert texts(found.train) == first["train"]["Doctor"] and len(found.train) == 80
    assert texts(found.validation) == second["train"]["Doctor"] and texts(found.test) == second["test"]["Doctor"]
    assert texts(splits_of(*sizes, "dataset.seed=43").test) != texts(found.test)


def test_one_held_out_part_serves_for_both(splits_of):
    found = splits_of("dataset.template.text='{Doctor}'", "dataset.test_size=7")
    assert found.test is found.validation and (len(found.train), len(found.test)) == (93, 7)


def test_counts_are_held_out_too(splits_of):
    from datasets import Dataset

    found = splits_of("dataset.columns.text=Doctor", "dataset.test_size=6", "dataset.validation_size=4")
    first = Dataset.from_list(rows()).train_test_split(test_size=10, seed=42)
    second = first["test"].train_test_split(test_size=6, seed=42)
    assert texts(found.validation) == second["train"]["Doctor"] and texts(found.test) == second["test"]["Doctor"]


def test_a_duplicate_stays_on_one_side(splits_of):
    data = [{"text": f"t{i % 40}"} for i in range(100)]
    found = splits_of("dataset.test_size=0.3", data=data)
    held, trained = texts(found.test), texts(found.train)
    assert held and not set(held) & set(trained) and len(trained) == 70
    assert found.notes == [f"{30 - len(held)} held-out rows are also among the training rows: left out"]
    with pytest.raises(KitError, match="every held-out row is also among the training rows"):
        splits_of("dataset.test_size=0.3", data=[{"text": "the same"}] * 10)


def test_equal_rows_are_equal_whatever_the_place(splits_of):
    data = [{"text": "a"}, {"text": "b"}, {"text": "a"}, {"text": "a "}]
    hashes = splits_of(data=data).train.rows["hash"][:]
    assert hashes[0] == hashes[2] and len(set(hashes)) == 3


@pytest.mark.parametrize(
    ("split", "first", "count"),
    [
        ("train[:10%]", 0, 10),
        ("train[10%:30%]", 10, 20),
        ("train[:7]", 0, 7),
        ("train[-5:]", 95, 5),
        ("train", 0, 100),
    ],
)
def test_slices_of_a_split(splits_of, split, first, count):
    train = splits_of("dataset.columns.text=Doctor", f"dataset.split='{split}'").train
    assert texts(train) == [f"a{n}" for n in range(first, first + count)]


def test_limits(splits_of, tmp_path):
    other = write_rows(tmp_path / "eval.jsonl", rows(30))
    found = splits_of("dataset.columns.text=Doctor", "dataset.limit=9", f"dataset.eval_path={other}",
                      "dataset.eval_limit=4")  # fmt: skip
    assert texts(found.train) == [f"a{n}" for n in range(9)] and texts(found.test) == ["a0", "a1", "a2", "a3"]
    assert found.test is found.validation


def test_where_a_row_stands(splits_of, tmp_path):
    train = splits_of("dataset.columns.text=Doctor").train
    record = train.rows[5]
    assert (record["file"], record["number"], record["source"]) == (str(tmp_path / "rows.jsonl"), 6, 0)
    content = (tmp_path / "rows.jsonl").read_bytes()[record["offset"] :]
    assert json.loads(content.splitlines()[0]) == rows()[5] == json.loads(record["row"])


# ---- several sets ----


@pytest.fixture
def two(tmp_path) -> tuple[Path, Path]:
    """Six texts, and three chats in ShareGPT's words."""
    chats = [{"conversations": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": f"b{n}"}]}
             for n in range(3)]  # fmt: skip
    return (write_rows(tmp_path / "a.jsonl", [{"text": f"a{n}"} for n in range(6)]),
            write_rows(tmp_path / "b.jsonl", chats))  # fmt: skip


def first_text(row: dict) -> str:
    return row["text"] if "text" in row else row["messages"][-1]["content"]


def test_sets_one_behind_the_other(splits_of, two):
    found = splits_of(f"dataset.mix=[{{path: '{two[0]}', limit: 4}}, {{path: '{two[1]}'}}]")
    assert [source.format for source in found.train.sources] == ["text", "sharegpt"]
    assert [first_text(found.train[n]) for n in range(7)] == ["a0", "a1", "a2", "a3", "b0", "b1", "b2"]
    assert found.train.rows["source"][:] == [0] * 4 + [1] * 3


@pytest.mark.parametrize("until", ["first_exhausted", "all_exhausted"])
def test_sets_by_weight_are_those_of_interleave_datasets(splits_of, two, until):
    from datasets import Dataset, interleave_datasets

    found = splits_of(f"dataset.mix=[{{path: '{two[0]}', weight: 3}}, {{path: '{two[1]}', weight: 1}}]",
                      f"dataset.mix_until={until}", "dataset.seed=7")  # fmt: skip
    sets = [Dataset.from_list([{"x": f"{name}{n}"} for n in range(count)]) for name, count in (("a", 6), ("b", 3))]
    theirs = interleave_datasets(sets, [0.75, 0.25], seed=7, stopping_strategy=until)
    assert [first_text(found.train[n]) for n in range(len(found.train))] == list(theirs["x"])


def test_each_set_is_split_by_itself(splits_of, two):
    found = splits_of(f"dataset.mix=[{{path: '{two[0]}'}}, {{path: '{two[1]}'}}]", "dataset.test_size=0.34")
    assert sorted(found.test.rows["source"][:]) == [0, 0, 0, 1, 1]  # 0.34 of 6 and of 3, rounded up
    assert len(found.train) == 4


def test_some_weights_are_refused(splits_of, two):
    with pytest.raises(KitError, match="some of the data sets have a weight"):
        splits_of(f"dataset.mix=[{{path: '{two[0]}', weight: 3}}, {{path: '{two[1]}'}}]")
    with pytest.raises(KitError, match="a number of rows cannot be held out of several"):
        splits_of(f"dataset.mix=[{{path: '{two[0]}'}}, {{path: '{two[1]}'}}]", "dataset.test_size=2")


# ---- what is refused ----


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["dataset.template.text='{Docter}'"], "names 'Docter'; the data has Description, Patient, Doctor"),
        (["dataset.template.text='{Doctor.__class__}'"], "names 'Doctor.__class__'"),
        (["dataset.template.text='{Doctor[0]}'"], "names 'Doctor[0]'"),
        (["dataset.template.text='{Doctor!r}'"], "only {column} can stand in braces"),
        (["dataset.template.text='{Doctor:>9}'"], "only {column} can stand in braces"),
        (["dataset.template.text='{}'"], "only {column} can stand in braces"),
        (["dataset.template.text='{Doctor'"], "expected '}'"),
        (["dataset.template.text=plain"], "names no column"),
        (["dataset.template.prompt='{Doctor}'"], "a template of prompt makes no row"),
        (["dataset.template.txt='{Doctor}'"], "a template of txt makes no row"),
        (["dataset.template.text='{Doctor}'", "dataset.columns.text=Doctor"], "both dataset.columns and"),
        (["dataset.template.text='{Doctor}'", "dataset.format=messages"], "the template makes text, not messages"),
        (["dataset.columns.text=Doctor", "dataset.eval_split=test"], "has no split test; it has train"),
        (["dataset.columns.text=Doctor", "dataset.split=validation"], "has no split validation; it has train"),
        (["dataset.columns.text=Doctor", "dataset.validation_size=0.1"], "validation_size without dataset.test_size"),
        (["dataset.columns.text=Doctor", "dataset.test_size=0.6", "dataset.validation_size=0.4"], "leave no rows"),
        (["dataset.columns.text=Doctor", "dataset.test_size=6", "dataset.validation_size=0.4"], "is a share, the"),
        (["dataset.columns.text=Doctor", "dataset.test_size=0.1", "dataset.validation_size=-1"], "must be a share"),
    ],
)
def test_refused_by_the_check(plan_of, overrides, said):
    with pytest.raises(KitError) as refused:
        plan_of(*overrides)
    assert said in str(refused.value) and refused.value.code == 2


def test_too_few_rows_to_split(splits_of):
    with pytest.raises(KitError, match="cannot be split|leave none"):
        splits_of("dataset.columns.text=Doctor", "dataset.test_size=0.1", "dataset.validation_size=0.1", data=rows(2))
    with pytest.raises(KitError, match="120 held out of 100 rows leave none"):
        splits_of("dataset.columns.text=Doctor", "dataset.test_size=120")


def test_a_slice_that_is_none(splits_of):
    with pytest.raises(KitError) as refused:
        splits_of("dataset.columns.text=Doctor", "dataset.split='train[a:b]'")
    assert refused.value.problems[0].where == "dataset.split" and refused.value.problems[0].fix


def test_render_is_a_plain_function():
    assert row_template.render_row({"a": 1, "b": None}, {"text": "{{{a}}} {b}."}) == {"text": "{1} ."}


@pytest.mark.parametrize(
    "chosen, stops",
    {
        (): True,
        ("dataset.streaming=true", "trainer.max_steps=1"): True,
        ("dataset.test_size=0.1",): False,
        ("dataset.test_size=0.1", "dataset.eval_split=train"): True,
        (f"dataset.template.text='{DOCTOR}'", "dataset.columns={}"): False,
    }.items(),
)
def test_reading_stops_at_the_limit_where_nothing_is_parted_before(chosen, stops, plan_of):
    named = () if "template" in "".join(chosen) else ("dataset.columns.text=Doctor",)
    (opened,), _ = open_sources(plan_of("dataset.limit=5", *named, *chosen).dataset)
    assert opened.source.limit == (5 if stops else None)
