"""The quickstart's data: reproducible, held out in truth, and with an end token that is trained."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

import pytest
import yaml

from kit.quickstart import data as data

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def letters(text: str) -> str:
    """The single capital letters of a text, sorted."""
    return "".join(sorted(re.findall(r"\b[A-Z]\b", text)))


def question(row: dict) -> str:
    return row["messages"][0]["content"]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    data.write_base_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(quickstart: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(quickstart / "init")


def test_committed_files_are_what_the_generator_makes(tmp_path: Path) -> None:
    data.write_chats(tmp_path)
    for name in ("letters_train.jsonl", "letters_heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (RECIPES / "data" / name).read_bytes()
        assert (tmp_path / name).stat().st_size < 400_000


@pytest.mark.parametrize("seed", [0, 1])
def test_no_letter_set_is_shared(seed: int) -> None:
    train = {letters(question(row)) for row in data.make_chat_rows(seed)}
    heldout = {letters(question(row)) for row in data.make_heldout_rows(seed)}
    assert (len(train), len(heldout)) == (data.TRAIN_ROWS, data.HELDOUT_ROWS)
    assert all(len(set(found)) == 4 for found in train | heldout)
    assert not train & heldout
    # stricter than asked: the base has not read a held-out set either
    read = {"".join(sorted(set(letters(sentence)))) for sentence in data.make_corpus(seed)}
    assert not read & heldout


def test_rows_are_chats_with_the_right_answer() -> None:
    for row in [*data.make_chat_rows(), *data.make_heldout_rows()]:
        assert list(row) == ["messages"]
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert assistant["content"] == letters(user["content"])[0]


def test_seeds_differ_and_repeat() -> None:
    assert data.make_corpus(3, 50) == data.make_corpus(3, 50) != data.make_corpus(4, 50)
    assert data.make_chat_rows(3, 50) == data.make_chat_rows(3, 50) != data.make_chat_rows(4, 50)


def test_no_answer_dominates() -> None:
    answers = [row["messages"][1]["content"] for row in data.make_heldout_rows()]
    assert max(answers.count(letter) for letter in set(answers)) < len(answers) / 5
    assert len(set(answers[:40])) > 5  # a limited evaluation is a fair one


def test_each_fact_has_several_phrasings() -> None:
    templates = {re.sub(r"\b[A-Z]\b(,? (and )?[A-Z]\b)*", "#", sentence) for sentence in data.make_corpus(0, 2000)}
    assert len(templates) >= 8


def test_tokenizer_gives_back_the_text(tokenizer) -> None:
    texts = [*islice(data.make_corpus(), 200), "Größe, 字 and a tab\t: any text. ", " two  spaces", "B"]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("seed", [0, 1])
def test_letters_are_one_token_wherever_they_stand(seed: int, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    data.write_base_inputs(tmp_path, seed)
    small = Tokenizer.from_file(str(tmp_path / "init" / "tokenizer.json"))
    assert small.get_vocab_size() == data.VOCAB_SIZE == data.MODEL_CONFIG["vocab_size"]
    for text in [*data.make_corpus(seed, 300), *map(question, data.make_heldout_rows(seed))]:
        encoded = small.encode(text)
        places = [match.start() for match in re.finditer(r"\b[A-Z]\b", text)]
        assert [encoded.tokens[encoded.char_to_token(place)] for place in places] == [f"Ġ{text[p]}" for p in places]


def test_special_tokens_are_distinct_and_stand_in_the_model_config(tokenizer, quickstart: Path) -> None:
    config = json.loads((quickstart / "init" / "config.json").read_text(encoding="utf-8"))
    found = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert found == tuple(config[f"{name}_token_id"] for name in ("pad", "bos", "eos"))
    assert len(set(found)) == 3
    assert len(tokenizer) == config["vocab_size"]
    for token in data.SPECIAL_TOKENS:
        assert tokenizer(token, add_special_tokens=False).input_ids == [data.SPECIAL_TOKENS.index(token)]


def test_template_marks_the_answer_and_its_end_token(tokenizer) -> None:
    messages = data.make_chat_rows(0, 1)[0]["messages"]
    both = tokenizer.apply_chat_template([*messages, *messages], return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(both["input_ids"], both["assistant_masks"], strict=True) if mark]
    answer = tokenizer(" " + messages[1]["content"], add_special_tokens=False).input_ids
    assert len(answer) == 1
    assert marked == [*answer, tokenizer.eos_token_id] * 2


def test_prompt_is_a_prefix_of_the_whole_chat(tokenizer) -> None:
    messages = data.make_chat_rows(0, 1)[0]["messages"]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert len(whole) == len(prompt) + 2
    assert max(len(whole), len(prompt)) < 64  # the recipe's max_length cuts no answer off


def test_template_refuses_an_unknown_role(tokenizer) -> None:
    with pytest.raises(Exception, match="found tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_recipe_prompts_are_held_out() -> None:
    prompts = yaml.safe_load((RECIPES / "quickstart.yaml").read_text(encoding="utf-8"))["prompts"]
    assert 4 <= len(prompts) <= 6
    assert set(prompts) <= set(map(question, data.make_heldout_rows()))
