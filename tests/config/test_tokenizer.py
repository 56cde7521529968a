"""The section `tokenizer` against the files of real tokenizers, in `kit check`: no torch is needed for it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny

from kit import api
from kit.config.added_tokens import find_embedding_names, is_tied, train_embeddings
from kit.errors import KitError
from kit.inspection import tokenizer
from kit.inspection.model import Base

SIZE = len(tiny.SPECIAL) + len(set(tiny.WORDS))
NEW = "tokenizer.added_tokens=['<|im_start|>','<|im_end|>']"


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to change files in."""
    return Path(shutil.copytree(base, tmp_path / "model"))


@pytest.fixture
def check(model: Path, chat: Path):
    return lambda *more: api.check(f"model.name_or_path={model}", f"dataset.path={chat}", *more)


@pytest.fixture
def plan(model: Path, chat: Path):
    return lambda *more: api.compose(f"model.name_or_path={model}", f"dataset.path={chat}", *more)


def edit(file: Path, **values) -> None:
    content = json.loads(file.read_text())
    for key, value in values.items():
        content.pop(key, None) if value is ... else content.update({key: value})
    file.write_text(json.dumps(content))


def only(problems, key: str, *words: str) -> None:
    assert len(problems) == 1, problems
    assert key in problems[0].where and problems[0].fix, problems
    for word in words:
        assert word in str(problems[0]), problems[0]


# ---- tokens ----


def test_the_files_say_what_the_tokenizer_says(model):
    from transformers import AutoTokenizer

    theirs, files = AutoTokenizer.from_pretrained(model), tokenizer.read_tokenizer_files(model)
    assert files.tokens == theirs.get_vocab() and files.size == len(theirs) == SIZE
    assert files.roles == {role: getattr(theirs, role) for role in tokenizer.ROLES}
    assert files.template == theirs.chat_template
    assert files.special == {i for i, t in theirs.added_tokens_decoder.items() if t.special}


@pytest.mark.parametrize("role", tokenizer.ROLES)
def test_a_named_token_must_exist(check, role):
    assert check(f"tokenizer.{role}='<|user|>'") == []
    only(check(f"tokenizer.{role}='<|usr|>'"), f"tokenizer.{role}", f"{SIZE} tokens", "<|user|>")
    assert check(f"tokenizer.{role}='<|usr|>'", "tokenizer.added_tokens=['<|usr|>']") == []


@pytest.mark.parametrize("role", ["pad_token", "eos_token"])
def test_a_token_that_is_not_there_is_not_guessed(check, model, role):
    edit(model / "tokenizer_config.json", **{role: None})
    only(check(), f"tokenizer.{role}", "none is guessed")
    assert check(f"tokenizer.{role}='<unk>'") == []
    edit(model / "tokenizer_config.json", **{role: ..., "tokenizer_class": "Qwen2Tokenizer"})
    assert check() == [], "the class may have one of its own: that is not known here"


def test_padding_with_the_end_token_is_remarked(plan):
    assert any("both </s>" in note for note in plan("tokenizer.pad_token='</s>'").notes)
    assert not any("pad_token" in note for note in plan().notes)


def test_a_tokenizer_larger_than_the_embeddings_is_refused(check, model):
    edit(model / "config.json", vocab_size=SIZE - 2)
    only(check(), "tokenizer.name_or_path", f"{SIZE} tokens", f"{SIZE - 2} rows")
    content = json.loads((model / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": SIZE, "content": "<image>"})
    (model / "tokenizer.json").write_text(json.dumps(content))
    edit(model / "config.json", vocab_size=SIZE)
    assert check() == [], "one special token that no text need hold"
    only(check("tokenizer.pad_token='<image>'"), "tokenizer.name_or_path", f"{SIZE + 1} tokens", "<image>")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"model": {}}', '{"model": {"vocab": {"a": 0}}, "added_tokens": [{}]}']
)
def test_a_damaged_tokenizer_is_named(check, model, content):
    (model / "tokenizer.json").write_text(content)
    assert "tokenizer.json" in "\n".join(map(str, check()))


def test_a_sentencepiece_folder_is_not_guessed_at(check, model):
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    assert check("tokenizer.pad_token='<nowhere>'") == []


def test_a_unigram_vocabulary_is_counted(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"model": {"vocab": [["<unk>", 0.0], ["a", -1.0]]}, "added_tokens": []}))
    assert tokenizer.read_vocabulary(file) == ({"<unk>": 0, "a": 1}, set())


# ---- chat templates ----


def test_chats_need_a_template(check, model, tmp_path):
    (model / "chat_template.jinja").unlink()
    only(check(), "tokenizer.chat_template", "no chat template", "tokenizer=chatml")
    assert check("tokenizer.chat_template=llama3") == []
    assert check("tokenizer=chatml") == []
    (tmp_path / "text.jsonl").write_text('{"text": "plain"}\n')
    assert check(f"dataset.path={tmp_path / 'text.jsonl'}") == [], "plain text needs none"
    edit(model / "tokenizer_config.json", chat_template="{{ messages }}")
    assert check() == []


def test_template_names(check, plan, tmp_path, monkeypatch):
    only(check("tokenizer.chat_template=lama3"), "tokenizer.chat_template", "did you mean", "llama3")
    only(check("tokenizer.chat_template=no/such.jinja"), "tokenizer.chat_template", "no/such.jinja")
    assert len(tokenizer.named_templates()) > 50
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama3").mkdir()
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert plan("tokenizer.chat_template=llama3").tokenizer.chat_template == "llama3", "a name is no path"
    assert plan("tokenizer.chat_template=own.jinja").tokenizer.chat_template == str(tmp_path / "own.jinja")


def test_without_trl_a_name_is_left_open(plan, check, monkeypatch):
    monkeypatch.setattr(tokenizer, "trl_templates", lambda: None)
    assert any("llama3" in note and "not installed" in note for note in plan("tokenizer.chat_template=llama3").notes)
    assert check("tokenizer=chatml", "trainer.assistant_only_loss=true") == [], "the kit's own needs no TRL"


def test_a_template_without_marks_is_no_hindrance(check, plan, tmp_path):
    """Where the answers stand is derived by rendering; a row in which that cannot be is refused when it is read."""
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for template in ("llama3", "llama3_training", "chatml", str(tmp_path / "plain.jinja")):
        chosen = (f"tokenizer.chat_template={template}", "trainer.assistant_only_loss=true")
        assert check(*chosen) == []
        assert plan(*chosen).train_on == "assistant_turns"


def test_templates_that_fit_a_vocabulary():
    """The most demanding first; a name for training only is none to advise."""
    llama3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    qwen = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    assert tokenizer.fitting_templates([*llama3, "word"])[0].startswith("llama3")
    assert "chatml" in tokenizer.fitting_templates(qwen[:2])
    fitting = tokenizer.fitting_templates([*llama3, *qwen])
    assert len(fitting) == 3 and not any(name.endswith("_training") for name in fitting)
    needs = [set(tokenizer.CONTROL_TOKEN.findall(tokenizer.named_templates()[n].read_text())) for n in fitting]
    assert [len(tokens) for tokens in needs] == sorted(map(len, needs), reverse=True)
    assert all(tokens <= {*llama3, *qwen} for tokens in needs)
    assert tokenizer.fitting_templates(["word"]) == tokenizer.fitting_templates([]) == []


def test_what_is_advised_without_a_template(check, model):
    (model / "chat_template.jinja").unlink()
    assert "tokenizer=chatml" in check()[0].fix and "FILE.jinja" in check()[0].fix
    content = json.loads((model / "tokenizer.json").read_text())
    for number, token in enumerate(("<|im_start|>", "<|im_end|>")):
        entry = {**content["added_tokens"][-1], "id": SIZE + number, "content": token}
        content["added_tokens"].append(entry)
    (model / "tokenizer.json").write_text(json.dumps(content))
    [problem] = check()
    name = re.match(r"tokenizer\.chat_template=([\w.-]+) \(its tokens are in the vocabulary", problem.fix)[1]
    assert name in tokenizer.fitting_templates(["<|im_start|>", "<|im_end|>"])
    assert check(f"tokenizer.chat_template={name}") == [], "what is advised is accepted"
    assert tokenizer.advise_template(None) == tokenizer.advise_template([])


def test_chatml_renders_and_marks_the_answer_with_its_end(model):
    from transformers import AutoTokenizer

    known = AutoTokenizer.from_pretrained(model)
    known.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    known.chat_template = tokenizer.find_chat_template("chatml").read_text()
    chat = [{"role": "user", "content": "the patient"}, {"role": "assistant", "content": "has pain"}]
    assert known.apply_chat_template(chat, tokenize=False) == (
        "<|im_start|>user\nthe patient<|im_end|>\n<|im_start|>assistant\nhas pain<|im_end|>\n"
    )
    asked = known.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|im_start|>user\nthe patient<|im_end|>\n<|im_start|>assistant\n"
    out = known.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(out["input_ids"], out["assistant_masks"], strict=True)
    assert known.convert_ids_to_tokens([i for i, m in pairs if m]) == ["has", "pain", "<|im_end|>"]


# ---- added tokens ----


def test_added_tokens_are_trained_at_both_ends(plan, model):
    made = plan(NEW)
    assert made.peft["modules_to_save"] == ["embed_tokens", "lm_head"] and "ensure_weight_tying" not in made.peft
    assert any("2 tokens are added" in note for note in made.notes)
    assert any("modules_to_save" in note for note in made.notes)
    edit(model / "config.json", tie_word_embeddings=True)
    assert plan(NEW).peft["ensure_weight_tying"] is True
    assert plan(NEW, "peft=none").peft is None
    known = plan("tokenizer.added_tokens=['<|user|>']")
    assert "modules_to_save" not in known.peft and any("already" in note for note in known.notes)


def test_rows_over_a_tied_embedding_are_refused(check, model):
    """TRL 1.16 reads `lm_head.bias`, which PEFT's wrapper of a tied head does not have."""
    assert check("peft.trainable_token_indices=[5]") == []
    edit(model / "config.json", tie_word_embeddings=True)
    only(check("peft.trainable_token_indices=[5]"), "peft.trainable_token_indices", "modules_to_save")


REFUSED = [
    (["tokenizer.added_tokens=['<a>','<a>']"], "tokenizer.added_tokens", "twice"),
    (["tokenizer.added_tokens=[' ']"], "tokenizer.added_tokens", "blank"),
    ([NEW, "peft.trainable_token_indices=[5]"], "trainable_token_indices"),
    ([NEW, "peft.target_modules=[q_proj,embed_tokens]"], "peft.target_modules", "embed_tokens"),
    (["trainer.chat_template_path=x"], "trainer.chat_template_path", "tokenizer.chat_template"),
    (["trainer.eos_token=x"], "trainer.eos_token", "tokenizer.eos_token"),
    (["tokenizer.name_or_path=./nothing"], "tokenizer.name_or_path", "nothing"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: " ".join(c[0]))
def test_wrong_tokenizer_settings_are_refused(check, case):
    overrides, key, *words = case
    only(check(*overrides), key, *words)


def test_ends_of_known_and_unknown_models():
    """transformers' own defaults, where config.json does not say: the classes are asked."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for kind in ("llama", "qwen3", "mistral", "gemma2", "opt", "gpt2", "phi3", "glm4"):
        config = AutoConfig.for_model(kind)
        base = Base(config={"model_type": kind})
        assert is_tied(base) == config.tie_word_embeddings, kind
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        modules = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
        ends = modules[model.get_input_embeddings()], modules[model.get_output_embeddings()]
        assert find_embedding_names(base) == ends, kind
    foreign = Base(
        config={"model_type": "other", "tie_word_embeddings": False}, modules=["x.word_embeddings", "lm_head"]
    )
    assert find_embedding_names(foreign) == ("word_embeddings", "lm_head")
    peft, problems, _ = train_embeddings({"peft_type": "LORA"}, Base(), ["<a>"])
    assert re.search("name them: peft.modules_to_save", problems[0].fix)
    assert train_embeddings({"peft_type": "LORA", "modules_to_save": ["a", "b"]}, Base(), ["<a>"])[1] == []
    assert train_embeddings({"peft_type": "PROMPT_TUNING"}, Base(), [])[1] == []
    with pytest.raises(KitError):
        tokenizer.find_chat_template("nothing-like-it")
