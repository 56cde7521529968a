"""Generation: batched equals unbatched, stops where it should, adapter equals merged, and sources are told apart."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kit.data.encode import end_of_turn_id
from kit.errors import KitError
from kit.evaluation.generate import format_samples, generate
from kit.evaluation.sampling import generate_answers, stop_token_ids
from kit.models.sources import locate_models
from kit.storage.manifest import write_manifest
from kit.storage.safetensors_header import fingerprint_tensors

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = ["Hi", "What is the capital of France?", "a b c", "A rather long prompt that needs a good deal of padding."]


def make_tokenizer(chat=True):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|pad|>", "<|eos|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|eos|>")
    if chat:
        tokenizer.chat_template = CHATML
    return tokenizer


def make_model(seed=0, hidden=32, **extra):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=256,
        eos_token_id=257,
        **extra,
    )
    return LlamaForCausalLM(config).eval()


def answering_model(tokenizer, answer, after="\n", end="<|im_end|>"):
    """Says `answer` and `end` wherever it is asked: one-hot embeddings, no layers, a bigram table in lm_head."""
    model = make_model(hidden=264)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(260, 264))
        model.lm_head.weight.zero_()
        chain = tokenizer(after)["input_ids"][-1:] + tokenizer(answer + end)["input_ids"]
        for before, following in zip(chain, chain[1:], strict=False):
            model.lm_head.weight[following, before] = 5.0
    return model


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def make_run(folder, base, tokenizer, plan=None, recorded=None, **lora):
    """A run directory as training and merging leave it: plan.json, adapter/ with random weights, merged/."""
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False} | lora
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    save(model, tokenizer, folder / "adapter")
    write_manifest(folder / "adapter", kind="adapter", base=recorded)
    save(model.merge_and_unload(), tokenizer, folder / "merged")
    (folder / "plan.json").write_text(json.dumps({"model": {"name_or_path": str(base)}, **(plan or {})}))
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    return save(make_model(), tokenizer, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, base, tokenizer):
    return make_run(tmp_path_factory.mktemp("run"), base, tokenizer)


def test_left_padded_batches_equal_single_prompts_and_plain_generate(tokenizer):
    model, ids = make_model(), [tokenizer(p)["input_ids"] for p in PROMPTS]
    batched = generate_answers(model, tokenizer, ids, max_new_tokens=24, batch_size=4)
    single = generate_answers(model, tokenizer, ids, max_new_tokens=24, batch_size=1)
    assert batched == single
    assert [len(b["tokens"]) for b in batched] == [24] * 4 and not any(b["stopped"] for b in batched)
    for prompt, ours in zip(ids, batched, strict=True):  # by hand: the whole sequence again for each token
        for token in ours["tokens"]:
            logits = model(torch.tensor([prompt]), use_cache=False).logits[0, -1]
            assert int(logits.argmax()) == token
            prompt = [*prompt, token]


def test_learned_positions_are_counted_from_the_first_real_token(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=257)
    model, ids = GPT2LMHeadModel(config).eval(), [tokenizer(p)["input_ids"] for p in PROMPTS]
    batched = generate_answers(model, tokenizer, ids, max_new_tokens=20, batch_size=4)
    single = generate_answers(model, tokenizer, ids, max_new_tokens=20, batch_size=1)
    for ours, alone in zip(batched, single, strict=True):
        assert ours["tokens"] == alone["tokens"][: len(ours["tokens"])]
    assert len(batched[0]["tokens"]) == 64 - len(ids[3])  # the context ends before max_new_tokens does
    with pytest.raises(KitError, match="70 tokens and the model reads 64"):
        generate_answers(model, tokenizer, [[5] * 70], max_new_tokens=4, batch_size=1)


@pytest.mark.parametrize("end", ["<|eos|>", "<|im_end|>"])
def test_stops_at_the_end_of_text_and_of_the_turn(tokenizer, end):
    model = answering_model(tokenizer, "yes", end=end)
    prompts = [tokenizer("q\n")["input_ids"], tokenizer("a longer one\n")["input_ids"]]
    for answer in generate_answers(model, tokenizer, prompts, max_new_tokens=20, batch_size=2):
        assert answer["text"] == "yes" and answer["stopped"]
        assert answer["tokens"] == tokenizer("yes" + end)["input_ids"]
    cut = generate_answers(model, tokenizer, prompts, max_new_tokens=3, batch_size=2)
    assert [(c["text"], c["stopped"]) for c in cut] == [("yes", False)] * 2


def test_a_row_that_ends_early_does_not_end_its_neighbours(tokenizer):
    model = answering_model(tokenizer, "y")
    with torch.no_grad():  # after "!" nothing but more "!"
        bang = tokenizer("!")["input_ids"][0]
        model.lm_head.weight[bang, bang] = 5.0
    done, going = generate_answers(
        model,
        tokenizer,
        [tokenizer("q\n")["input_ids"], tokenizer("!!!!!!")["input_ids"]],
        max_new_tokens=9,
        batch_size=2,
    )
    assert (done["text"], done["stopped"]) == ("y", True)
    assert (going["text"], going["stopped"]) == ("!" * 9, False)


def test_stop_text_ends_an_answer(tokenizer):
    model = answering_model(tokenizer, " yes\nno", after=":", end="\nmore")
    (answer,) = generate_answers(
        model, tokenizer, [tokenizer("q:")["input_ids"]], max_new_tokens=20, batch_size=1, stop_text="\n"
    )
    assert (answer["text"], answer["stopped"]) == (" yes", True)
    assert answer["tokens"] == tokenizer(" yes\n")["input_ids"]


def test_own_penalties_and_cache_setting_of_a_model_are_not_used(tokenizer):
    plain, ids = make_model(), [tokenizer(p)["input_ids"] for p in PROMPTS[:2]]
    wanted = generate_answers(plain, tokenizer, ids, max_new_tokens=24, batch_size=2)
    model = make_model()
    model.generation_config.repetition_penalty, model.generation_config.do_sample = 5.0, True
    model.config.use_cache = model.generation_config.use_cache = False
    assert generate_answers(model, tokenizer, ids, max_new_tokens=24, batch_size=2) == wanted


def test_sampling_follows_the_seed(tokenizer):
    model, ids = make_model(), [tokenizer(p)["input_ids"] for p in PROMPTS]

    def draw(seed):
        return generate_answers(
            model, tokenizer, ids, max_new_tokens=12, batch_size=4, temperature=2.0, top_p=0.9, seed=seed
        )

    assert draw(3) == draw(3) != draw(4)


def test_stop_ids_are_gathered_from_model_tokenizer_and_template(tokenizer):
    model = make_model()
    model.generation_config.eos_token_id = [5, 6]
    assert end_of_turn_id(tokenizer) == 259 and stop_token_ids(model, tokenizer) == [5, 6, 257, 259]
    assert end_of_turn_id(make_tokenizer(chat=False)) is None


def test_run_shows_base_adapter_and_merged(run, base, tokenizer, tmp_path):
    result = generate(run, prompts=[*PROMPTS, [{"role": "user", "content": "Hi"}]], max_new_tokens=16, raw=False)
    samples = json.loads((run / "samples.json").read_text())
    assert samples == result["samples"] and result["file"] == str(run / "samples.json")
    assert not list(run.glob(".samples*"))
    assert [s["prompt"] for s in samples[:4]] == PROMPTS
    assert all(list(s["outputs"]) == ["base", "adapter", "merged"] for s in samples)
    assert result["adapter_equals_merged"] is True and result["first_difference"] is None
    assert samples[0]["outputs"]["base"]["tokens"] != samples[0]["outputs"]["adapter"]["tokens"]
    assert samples[0]["outputs"] == samples[4]["outputs"]  # text is a user turn

    plain = AutoModelForCausalLM.from_pretrained(base)
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    by_hand = plain.generate(torch.tensor([turn]), max_new_tokens=16, do_sample=False)[0, len(turn) :].tolist()
    assert samples[0]["outputs"]["base"]["tokens"] == by_hand
    adapted = PeftModel.from_pretrained(plain, run / "adapter")
    by_hand = adapted.generate(input_ids=torch.tensor([turn]), max_new_tokens=16, do_sample=False)[0, len(turn) :]
    assert samples[0]["outputs"]["adapter"]["tokens"] == by_hand.tolist()

    samples[0]["outputs"]["base"]["text"] = "\x1b[31mred [bold]"  # what a model says must not steer the terminal
    text = format_samples(samples, width=90)
    assert "\\x1b[31mred" in text
    assert all(name in text for name in ("base", "adapter", "merged")) and "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 90


def test_a_merge_that_differs_is_reported(run, base, tokenizer, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    save(make_model(seed=9), tokenizer, folder / "merged")
    result = generate(folder, prompts=["x"], which=["adapter", "merged"], max_new_tokens=8, raw=True)
    assert result["adapter_equals_merged"] is False
    first = result["first_difference"]
    outputs = result["samples"][0]["outputs"]
    assert outputs["adapter"]["tokens"][first["position"]] == first["adapter"] != first["merged"]
    assert generate(folder, prompts=["x"], which=["adapter"], max_new_tokens=2)["adapter_equals_merged"] is None


def test_raw_system_and_worked_examples(tmp_path, tokenizer):
    model = save(answering_model(tokenizer, " blue", after="?", end="\nQ"), tokenizer, tmp_path / "m")
    rows = [{"prompt": "Colour of grass?", "completion": "green"}]
    result = generate(model, prompts=["Colour of sky?"], raw=True, few_shot=rows, style="text", max_new_tokens=12)
    outputs = result["samples"][0]["outputs"]
    assert outputs["model_few_shot"]["text"] == " blue" and outputs["model_few_shot"]["stopped"]
    assert outputs["model"]["text"].startswith(" blue\nQ") and not outputs["model"]["stopped"]
    assert result["file"] is None
    with_system = generate(model, prompts=["?"], system="Be kind.", max_new_tokens=1, out=tmp_path / "o")
    assert (tmp_path / "o" / "samples.json").is_file() and with_system["settings"]["system"] == "Be kind."
    with pytest.raises(KitError, match="needs a chat"):
        generate(model, prompts=["?"], system="Be kind.", raw=True)


def test_default_prompts_come_from_plan_then_from_held_out_rows(base, run, tokenizer, tmp_path, monkeypatch):
    folder = shutil.copytree(run, tmp_path / "run")
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(9)
    ]
    monkeypatch.setattr("kit.evaluation.generate.load_run_datasets", lambda plan: (rows[:1], rows))
    result = generate(folder, which=["base"], max_new_tokens=1)
    assert [s["prompt"][0]["content"] for s in result["samples"]] == ["q0", "q1", "q2", "q3", "q4"]
    plan = {"model": {"name_or_path": str(base)}, "prompts": ["p1", "p2"]}
    (folder / "plan.json").write_text(json.dumps(plan))
    chat = generate(folder, which=["base"], max_new_tokens=6)
    assert [s["prompt"] for s in chat["samples"]] == ["p1", "p2"]
    plain_rows = [{"prompt": "q", "completion": "a"}]  # the run was not a chat, so neither are its prompts
    monkeypatch.setattr("kit.evaluation.generate.load_run_datasets", lambda plan: (plain_rows, None))
    plain = generate(folder, which=["base"], max_new_tokens=6)
    raw = generate(folder, which=["base"], max_new_tokens=6, raw=True)
    assert plain["samples"] == raw["samples"] != chat["samples"]


def test_added_tokens_and_retrained_embeddings(base, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<extra>"], special_tokens=True)
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(261)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"],
        init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(model, config)
    with torch.no_grad():
        model.get_input_embeddings().modules_to_save["default"].weight.add_(0.5)
    save(model, tokenizer, tmp_path / "adapter")
    save(model.merge_and_unload(), tokenizer, tmp_path / "merged")
    (tmp_path / "plan.json").write_text(json.dumps({"model": {"name_or_path": str(base)}}))
    result = generate(tmp_path, prompts=["<extra> and more"], max_new_tokens=16, raw=True)
    assert result["adapter_equals_merged"] is True
    outputs = result["samples"][0]["outputs"]
    assert outputs["base"] != outputs["adapter"]


def test_a_run_over_a_quantized_base_shows_that_base(tmp_path, tokenizer):
    base = save(make_model(hidden=64), tokenizer, tmp_path / "base")
    fields = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
    run = make_run(tmp_path / "run", base, tokenizer, plan={"quantization": fields})
    result = generate(run, prompts=["Hello"], raw=True, max_new_tokens=12)
    plain = generate(base, prompts=["Hello"], raw=True, max_new_tokens=12)
    assert result["settings"]["quantized_base"] and result["adapter_equals_merged"] is False
    assert result["samples"][0]["outputs"]["base"] != plain["samples"][0]["outputs"]["model"]


def test_sources_are_told_apart(run, base, tokenizer, tmp_path):
    assert list(locate_models(run).paths) == ["base", "adapter", "merged"] and locate_models(run).kind == "run"
    inner = locate_models(run / "adapter")
    assert inner.kind == "adapter" and inner.base == base.resolve()  # through the plan above it
    assert locate_models(base).paths == {"model": base.resolve()}

    full = tmp_path / "full"
    save(make_model(), tokenizer, full / "model")
    (full / "plan.json").write_text(json.dumps({"model": {"name_or_path": str(base)}}))
    assert list(locate_models(full).paths) == ["base", "model"]

    alone = shutil.copytree(run / "adapter", tmp_path / "alone")
    config = json.loads((alone / "adapter_config.json").read_text())
    (alone / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "no/such"}))
    write_manifest(alone, kind="adapter")
    with pytest.raises(KitError, match="base model was not found here: no/such"):
        locate_models(alone)
    assert locate_models(alone, base=str(base)).base == base.resolve()
    write_manifest(alone, kind="adapter", base={"name_or_path": str(base), "fingerprint": fingerprint_tensors(base)})
    assert locate_models(alone).base == base.resolve()
    other = save(make_model(seed=5), tokenizer, tmp_path / "other")
    with pytest.raises(KitError, match="not the base that"):
        locate_models(alone, base=str(other))

    moved = shutil.copytree(run, tmp_path / "moved")
    (moved / "plan.json").write_text(json.dumps({"model": {"name_or_path": "no/such"}}))
    shutil.copy(alone / "adapter_config.json", moved / "adapter" / "adapter_config.json")
    config = json.loads((moved / "adapter" / "adapter_config.json").read_text())
    (moved / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "no/such"}))
    write_manifest(moved / "adapter", kind="adapter")
    partial = locate_models(moved)
    assert list(partial.paths) == ["merged"] and set(partial.skipped) == {"base", "adapter"}
    with pytest.raises(KitError, match="has no 'adapter'.*not found"):
        generate(moved, prompts=["x"], which=["adapter"])


def test_bad_sources_and_settings_are_refused(run, base, tokenizer, tmp_path):
    def refused(match, source, **settings):
        with pytest.raises(KitError, match=match) as caught:
            generate(source, **({"prompts": ["x"], "max_new_tokens": 1} | settings))
        return caught.value

    refused("neither a folder nor a model", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("not a run, an adapter or a model", tmp_path / "empty")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "plan.json").write_text("{}")
    assert "kit resume" in refused("no finished adapter", tmp_path / "unfinished").problems[0].fix
    (tmp_path / "unfinished" / "plan.json").write_text("{")
    refused("cannot be read", tmp_path / "unfinished")

    torn = shutil.copytree(run / "adapter", tmp_path / "torn")
    (torn / "adapter_model.safetensors").unlink()
    refused("has no adapter_model.safetensors", torn, base=str(base))
    part = shutil.copytree(run, tmp_path / "part")
    config = json.loads((part / "adapter" / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "v_proj", "down_proj", "o_proj"]
    (part / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    write_manifest(part / "adapter", kind="adapter")
    refused("adapter lacks 4 tensors", part, which=["adapter"])
    (part / "merged" / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    refused("cannot be loaded", part, which=["merged"])

    from safetensors.torch import load_file, save_file

    headless = shutil.copytree(base, tmp_path / "headless")
    tensors = load_file(headless / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, headless / "model.safetensors", metadata={"format": "pt"})
    refused("lacks 1 tensors", headless)
    data = (base / "model.safetensors").read_bytes()
    (headless / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused("cut short", headless)
    mute = save(make_model(), None, tmp_path / "mute")
    refused("has no tokenizer", mute)
    save(make_model(), make_tokenizer(chat=False), mute)
    refused("no chat template", mute, prompts=[[{"role": "user", "content": "x"}]])

    refused("max_new_tokens is 0", base, max_new_tokens=0)
    refused("temperature", base, temperature=-1.0)
    refused("top_p", base, temperature=1.0, top_p=0.0)
    refused("no prompts", base, prompts=[])
    refused("no prompts", base, prompts=None)
    refused("neither text nor", base, prompts=[3])
    refused("dtype", base, dtype="int3")
    refused("style", base, few_shot=[{"prompt": "a", "completion": "b"}], style="verse")
    refused("has no 'merged'", base, which=["merged"])
    if not torch.cuda.is_available():
        assert refused("no GPU", base, device="cuda").code == 3
