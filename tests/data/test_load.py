"""From files to rows: templates over foreign columns, held-out parts, what is left out and what is refused."""

from __future__ import annotations

import pytest
from conftest import write_rows

from kit import api
from kit.data.load import load_datasets
from kit.errors import KitError
from kit.inspection import row_template

DOCTOR = "Description: {Description} Patient: {Patient} Doctor: {Doctor}"


def rows(n: int = 100) -> list[dict]:
    return [{"Description": f"d{i}", "Patient": f"p{i} {{x}}", "Doctor": f"a{i}"} for i in range(n)]


@pytest.fixture
def plan_of(base, tmp_path):
    def make(*overrides: str, data: list[dict] | None = None):
        path = write_rows(tmp_path / "rows.jsonl", rows() if data is None else data)
        stock = (f"model.name_or_path={base}", f"dataset.path={path}", f"runs_dir={tmp_path}")
        return api.compose(*stock, *overrides, here=True)

    return make


def test_text_written_from_columns(plan_of):
    plan = plan_of(f"dataset.template.text='{DOCTOR}'")
    assert plan.dataset.format == "text"
    assert load_datasets(plan).train[3] == {"text": "Description: d3 Patient: p3 {x} Doctor: a3"}


def test_prompt_completion_and_chat(plan_of):
    plan = plan_of("dataset.template.prompt='Q: {Patient}'", "dataset.template.completion=' {Doctor}'")
    assert load_datasets(plan).train[0] == {"prompt": "Q: p0 {x}", "completion": " a0"}
    plan = plan_of("dataset.template.user='{Description}\n{Patient}'", "dataset.template.assistant='{Doctor}'",
                   "dataset.template.system='Be short. {{ok}}'")  # fmt: skip
    assert plan.dataset.format == "messages"
    assert load_datasets(plan).train[1]["messages"] == [
        {"role": "system", "content": "Be short. {ok}"},
        {"role": "user", "content": "d1\np1 {x}"},
        {"role": "assistant", "content": "a1"},
    ]


def test_chat_with_the_answer_apart(plan_of):
    plan = plan_of("dataset.template.user='{Patient}'", "dataset.template.assistant='{Doctor}'",
                   "dataset.format=prompt_completion")  # fmt: skip
    assert plan.dataset.format == "prompt_completion"
    row = load_datasets(plan).train[0]
    assert row == {"prompt": [{"role": "user", "content": "p0 {x}"}],
                   "completion": [{"role": "assistant", "content": "a0"}]}  # fmt: skip


def test_a_column_may_keep_its_name(plan_of):
    plan = plan_of("dataset.template.text='<{text}>'", data=[{"text": "a"}, {"text": "b"}])
    assert load_datasets(plan).train["text"] == ["<a>", "<b>"]


def test_a_stream_is_written_too(plan_of):
    plan = plan_of(f"dataset.template.text='{DOCTOR}'", "dataset.streaming=true", "trainer.max_steps=1")
    assert next(iter(load_datasets(plan).train)) == {"text": "Description: d0 Patient: p0 {x} Doctor: a0"}


def test_rows_without_an_answer_are_left_out_and_counted(plan_of):
    data = rows(10)
    data[2]["Doctor"], data[5]["Doctor"], data[7]["Patient"] = " \n", None, None
    plan = plan_of("dataset.template.prompt='{Patient}'", "dataset.template.completion='{Doctor}'", data=data)
    found = load_datasets(plan)
    assert len(found.train) == 8 and found.notes == ["2 of 10 rows of dataset.path have an empty answer: left out"]
    assert {"prompt": "", "completion": "a7"} in list(found.train)  # a null is an empty text, not "None"


def test_the_held_out_parts_are_those_of_two_splits_in_a_row(plan_of):
    """Sizes and membership of `train_test_split(0.2, seed=42)` and then `train_test_split(0.5, seed=42)`."""
    from datasets import Dataset

    found = load_datasets(plan_of("dataset.template.text='{Doctor}'", "dataset.test_size=0.1",
                                  "dataset.validation_size=0.1"))  # fmt: skip
    first = Dataset.from_list(rows()).train_test_split(test_size=0.2, seed=42)
    second = first["test"].train_test_split(test_size=0.5, seed=42)
    assert found.train["text"] == first["train"]["Doctor"] and len(found.train) == 80
    assert found.validation["text"] == second["train"]["Doctor"] and found.test["text"] == second["test"]["Doctor"]
    other = load_datasets(plan_of("dataset.template.text='{Doctor}'", "dataset.test_size=0.1",
                                  "dataset.validation_size=0.1", "dataset.seed=43"))  # fmt: skip
    assert other.test["text"] != found.test["text"]


def test_one_held_out_part_serves_for_both(plan_of):
    found = load_datasets(plan_of("dataset.template.text='{Doctor}'", "dataset.test_size=7"))
    assert found.test is found.validation and (len(found.train), len(found.test)) == (93, 7)


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
        (["dataset.columns.text=Doctor", "dataset.eval_split=test"], "which has no splits"),
        (["dataset.columns.text=Doctor", "dataset.split=validation"], "which has no splits"),
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


def test_all_answers_empty_is_refused(plan_of):
    data = [{"q": "x", "a": ""}, {"q": "y", "a": None}]
    plan = plan_of("dataset.template.prompt='{q}'", "dataset.template.completion='{a}'", data=data)
    with pytest.raises(KitError, match="holds no rows"):
        load_datasets(plan)


def test_too_few_rows_to_split(plan_of):
    with pytest.raises(KitError, match="cannot be split|leave none"):
        load_datasets(plan_of("dataset.columns.text=Doctor", "dataset.test_size=0.1", "dataset.validation_size=0.1",
                              data=rows(2)))  # fmt: skip


def test_render_is_a_plain_function():
    assert row_template.render_row({"a": 1, "b": None}, {"text": "{{{a}}} {b}."}) == {"text": "{1} ."}
