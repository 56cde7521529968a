"""Scores equal what a plain loop over single rows gives, and the baselines beside them are what they say."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_generate import answering_model, make_model, make_run, make_tokenizer, save
from transformers import AutoModelForCausalLM

from kit.errors import KitError
from kit.evaluation import evaluate as evaluate_module
from kit.evaluation.evaluate import evaluate, format_table


def chat(question, answer, system=None):
    lead = [{"role": "system", "content": system}] if system else []
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": lead + turns}


CHATS = [
    chat("Is it?", "yes"),
    chat("Is it not, after all that was said about it?", "no"),
    chat("And this?", " yes ", system="Answer briefly."),
    {"messages": chat("First", "a long first answer")["messages"] + chat("Then?", "maybe so")["messages"]},
]
PLAIN = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "Twelve and thirty make ", "completion": "forty-two"}]
TEXTS = [{"text": "a"}, {"text": "some longer text, with commas"}]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    return save(make_model(), tokenizer, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, base, tokenizer):
    return make_run(tmp_path_factory.mktemp("run"), base, tokenizer)


@pytest.fixture(scope="module")
def yes(tmp_path_factory, tokenizer):
    return save(answering_model(tokenizer, "yes"), tokenizer, tmp_path_factory.mktemp("yes"))


def prompt_and_answer(tokenizer, row):
    """Token ids of a row put together by hand."""
    if "text" in row:
        return [], tokenizer(row["text"] + "<|eos|>")["input_ids"]
    if "prompt" in row:
        return tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"] + "<|eos|>")["input_ids"]
    *before, last = row["messages"]
    lead = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in before) + "<|im_start|>assistant\n"
    return tokenizer(lead)["input_ids"], tokenizer(last["content"] + "<|im_end|>")["input_ids"]


def loss_by_hand(folder, tokenizer, rows):
    model, total, tokens = AutoModelForCausalLM.from_pretrained(folder), 0.0, 0
    for row in rows:
        prompt, answer = prompt_and_answer(tokenizer, row)
        labels = torch.tensor([[-100] * len(prompt) + answer])
        count = len(answer) - (not prompt)
        total += model(torch.tensor([prompt + answer]), labels=labels).loss.item() * count
        tokens += count
    return total / tokens, tokens


@pytest.mark.parametrize("rows", [CHATS, PLAIN, TEXTS], ids=["chat", "prompt_completion", "text"])
def test_loss_is_the_token_weighted_mean_over_single_rows(base, tokenizer, rows, monkeypatch):
    wanted, tokens = loss_by_hand(base, tokenizer, rows)
    for batch_size in (1, 3, 16):
        scores = evaluate(base, data=rows, metrics=["loss", "perplexity"], batch_size=batch_size)["models"]["model"]
        assert scores["tokens"] == tokens
        assert scores["loss"] == pytest.approx(wanted, rel=1e-5)
        assert scores["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-4)
    monkeypatch.setattr("kit.evaluation.loss.MAX_LOGITS", 1)  # no room for two rows at once
    assert evaluate(base, data=rows, metrics=["loss"])["models"]["model"]["loss"] == pytest.approx(wanted, rel=1e-5)


def test_exact_match_equals_a_loop_by_hand(yes, tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, CHATS)) + "\n\n")
    scores = evaluate(yes, data=file, max_new_tokens=8)["models"]["model"]
    model, correct = AutoModelForCausalLM.from_pretrained(yes), 0
    for row in CHATS:
        prompt, _ = prompt_and_answer(tokenizer, row)
        out = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=[257, 259])
        text = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
        correct += text.strip() == row["messages"][-1]["content"].strip()
    assert scores["correct"] == correct == 2 and scores["exact_match"] == 0.5 and scores["unstopped"] == 0
    assert [m["reference"] for m in scores["mistakes"]] == ["no", "maybe so"]
    assert {m["answer"] for m in scores["mistakes"]} == {"yes"}


def test_an_answer_that_does_not_end_is_wrong(yes, base):
    scores = evaluate(yes, data=[CHATS[0]], max_new_tokens=3, metrics=["exact_match"])["models"]["model"]
    assert (scores["exact_match"], scores["unstopped"]) == (0.0, 1)  # "yes", but cut off before its end token
    assert "loss" not in scores
    assert evaluate(yes, data=[CHATS[0]], max_new_tokens=4)["models"]["model"]["exact_match"] == 1.0


def test_run_scores_base_adapter_and_merged_on_its_held_out_rows(run, base, tokenizer, monkeypatch):
    monkeypatch.setattr(evaluate_module, "load_run_datasets", lambda plan: (CHATS[:1], CHATS))
    result = evaluate(run, max_new_tokens=4, limit=3)
    assert list(result["models"]) == ["base", "adapter", "merged", "most_frequent"]
    models = result["models"]
    assert models["adapter"]["loss"] == pytest.approx(models["merged"]["loss"], rel=1e-5)
    assert abs(models["adapter"]["loss"] - models["base"]["loss"]) > 1e-3
    for name, folder in (("base", base), ("merged", run / "merged")):
        assert models[name]["loss"] == pytest.approx(loss_by_hand(folder, tokenizer, CHATS[:3])[0], rel=1e-5)
    assert (
        models["most_frequent"]["exact_match"] == pytest.approx(2 / 3) and models["most_frequent"]["answer"] == "yes"
    )
    stored = json.loads((run / "eval.json").read_text())
    assert result == stored | {"file": str(run / "eval.json")} and stored["rows"] == 3
    text = format_table(result, width=100)
    assert "most frequent answer" in text and "66.7 %" in text and f"{models['base']['loss']:.4f}" in text
    monkeypatch.setattr(evaluate_module, "load_run_datasets", lambda plan: (CHATS, None))
    with pytest.raises(KitError, match="holds out no rows"):
        evaluate(run)


def test_most_frequent_answer_of_training_rows(yes):
    train = [chat("a", "no"), chat("b", "no "), chat("c", "yes"), {"messages": []}]
    scores = evaluate(yes, data=CHATS, train_data=train, max_new_tokens=6)["models"]["most_frequent"]
    assert scores == {"exact_match": 0.25, "correct": 1, "answer": "no", "share_of_training": pytest.approx(2 / 3)}
    assert "most_frequent" not in evaluate(yes, data=CHATS, train_data=train, most_frequent=False)["models"]
    assert "most_frequent" not in evaluate(yes, data=CHATS)["models"]


def test_worked_examples_as_lines_and_as_turns(tmp_path, tokenizer, yes, monkeypatch):
    bare = make_tokenizer(chat=False)
    rows = [{"prompt": "Sky?", "completion": "blue"}, {"prompt": "Sea?", "completion": "green"}]
    lines = save(answering_model(bare, " blue", after="?", end="\nQ"), bare, tmp_path / "lines")
    seen = []
    plain = evaluate_module.encode_few_shot_prompt

    def spy(tokenizer, pair, shots, **kwargs):
        ids = plain(tokenizer, pair, shots, **kwargs)
        seen.append(tokenizer.decode(ids))
        return ids

    monkeypatch.setattr(evaluate_module, "encode_few_shot_prompt", spy)
    train = [{"prompt": f"Thing {i}?", "completion": f"colour {i}"} for i in range(9)]
    result = evaluate(lines, data=rows, train_data=train, few_shot=2, max_new_tokens=12)
    assert result["settings"]["style"] == "text"
    assert result["models"]["model"]["exact_match"] == 0.0  # no end: it goes on to the next line
    few = result["models"]["model_few_shot"]
    assert (few["exact_match"], few["unstopped"]) == (0.5, 0) and "loss" not in few
    first = seen[0].split("\n")
    assert len(first) == 3 and first[2] == "Sky?" and all(line.startswith("Thing ") for line in first[:2])
    assert first[0] != first[1] and "model + 2 examples" in format_table(result, width=100)
    again = list(seen)
    seen.clear()
    evaluate(lines, data=rows, train_data=train, few_shot=2, max_new_tokens=1)
    assert seen == again  # the same examples each time

    seen.clear()
    result = evaluate(yes, data=CHATS[2:3], train_data=[chat("Q", "A")], few_shot=3, max_new_tokens=6)
    assert result["settings"] | {"style": "chat", "few_shot": 1} == result["settings"]
    few = result["models"]["model_few_shot"]
    assert few["exact_match"] == 1.0 and few["tokens"] == result["models"]["model"]["tokens"]
    turns = [*CHATS[2]["messages"][:1], *chat("Q", "A")["messages"], *CHATS[2]["messages"][1:]]
    assert seen == [tokenizer.decode(prompt_and_answer(tokenizer, {"messages": turns})[0])]
    assert few["loss"] == pytest.approx(loss_by_hand(yes, tokenizer, [{"messages": turns}])[0], rel=1e-5)


def test_what_a_template_adds_to_an_answer_counts_as_right(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}#{% endif %}{{ m.content }}"
    )
    folder = save(answering_model(tokenizer, "#1"), tokenizer, tmp_path)
    scores = evaluate(folder, data=[chat("q", "1"), chat("q", "2")], max_new_tokens=8)["models"]["model"]
    assert (scores["correct"], scores["tokens"]) == (1, 6)  # the loss is over "#1" and "#2" with their end tokens


def test_rows_that_cannot_be_scored_are_counted(yes, base):
    rows = [{"messages": [{"role": "user", "content": "x"}]}, CHATS[0], chat("q", "x" * 600)]
    result = evaluate(yes, data=rows, max_new_tokens=4)
    assert result["rows"] == 2 and list(result["skipped"].values()) == ["1 rows"]
    assert result["models"]["model"]["too_long"] == 1
    assert "longer than the model reads" in format_table(result)
    mixed = evaluate(base, data=[*TEXTS, PLAIN[0]])
    assert mixed["rows"] == 2 and "the format is text" in "".join(mixed["skipped"])
    text = evaluate(base, data=TEXTS)
    assert "exact_match" not in text["models"]["model"] and "-" in format_table(text)


def test_bad_data_and_settings_are_refused(base, yes, tmp_path):
    def refused(match, source=base, **settings):
        with pytest.raises(KitError, match=match):
            evaluate(source, **({"data": CHATS} | settings))

    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "a"}\n{"text": \n')
    refused("bad.jsonl row 2: not JSON", data=file)
    refused("there is no data file", data=tmp_path / "none.jsonl")
    refused("no rows", data=[])
    refused("no rows to score", data=None)
    refused("the columns a, b are of none of the formats", data=[{"a": "a", "b": "b"}])
    refused("data row 1: text, not an object", data=["a"])
    refused("no assistant turn", data=[{"messages": [{"role": "user", "content": "x"}]}])
    refused("metric 'bleu'", metrics=["bleu"])
    refused("limit is 0", limit=0)
    refused("batch_size is 0", batch_size=0)
    refused("come from training rows", few_shot=2)
    refused("has no 'adapter'", which=["adapter"])
    refused("neither a folder", source=tmp_path / "nowhere")
