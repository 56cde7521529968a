"""`kit eject`: short, clean scripts that name everything a plan says, or a refusal. tests/launch runs them."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_rows

from kit import api
from kit.cli import verbs as cli
from kit.ejecting import script, text, verb
from kit.errors import DONE, REFUSED, KitError
from kit.schema import fields
from kit.storage import run_directory

RECIPES = sorted(f.stem for f in (ROOT / "recipes").glob("*.yaml"))
RUFF = shutil.which("ruff", path=f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(scope="module")
def ejected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every recipe's script, in a folder of its name."""
    folder = tmp_path_factory.mktemp("ejected")
    for name in RECIPES:
        verb.write_ejected(api.compose(f"recipe={name}"), folder / name)
    return folder


def arguments(code: str, function: str) -> dict[str, ast.expr]:
    """The keyword arguments of the one call of a function."""
    [found] = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call) and called(n) == function]
    return {str(k.arg): k.value for k in found.keywords}


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def not_default(table: str, values: dict) -> dict:
    return {k: v for k, v in values.items() if v != fields.field_default(table, k)}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_short_script_that_says_all_of_it(name, ejected):
    plan = api.compose(f"recipe={name}")
    code = (ejected / name / "train.py").read_text()
    assert len(code.splitlines()) <= 80 and "import kit" not in code and "from kit" not in code
    sft = arguments(code, "SFTConfig")
    for key, value in not_default("SFTConfig", plan.trainer).items():
        assert ast.literal_eval(sft[key]) == value, key
    if plan.peft:
        lora = arguments(code, "LoraConfig")
        values = {k: v for k, v in plan.peft.items() if k != "peft_type"}
        assert {k: ast.literal_eval(v) for k, v in lora.items()} == not_default("LORA", values)
    if plan.quantization:
        bits = {k: ast.literal_eval(v) for k, v in arguments(code, "BitsAndBytesConfig").items()}
        assert bits == {k: v for k, v in not_default("BitsAndBytesConfig", plan.quantization).items() if v is not None}
    loads = "from_config" if plan.model.random_init else "from_pretrained"
    assert f"AutoModelForCausalLM.{loads}(" in code and f"dtype=torch.{plan.model.dtype}" in code
    assert text.literal(plan.model.name_or_path) in code and text.literal(plan.dataset.path) in code
    for token in (plan.tokenizer.pad_token, plan.tokenizer.eos_token, *plan.tokenizer.added_tokens):
        assert token is None or text.literal(token) in code
    assert all(text.literal(t) in code for t in plan.dataset.template.values())
    assert code.index("set_seed(") < code.index("= SFTTrainer(")
    assert (ejected / name / "ds_config.json").is_file() is bool(plan.deepspeed)


def test_ruff_finds_nothing(ejected):
    assert RUFF
    shutil.copy(ROOT / "pyproject.toml", ejected)
    for argv in (["check", "--no-cache", "."], ["format", "--no-cache", "--check", "."]):
        done = subprocess.run([RUFF, *argv], cwd=ejected, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def plan_of(base: Path, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def compose(*more: str):
        given = {o.partition("=")[0] for o in more}
        stock = [f"model.name_or_path={base}", f"dataset.path={chat}", "trainer.use_cpu=true"]
        return api.compose(*[s for s in stock if s.partition("=")[0] not in given], *more)

    return compose


HELD = [  # overrides, and what the script, run.sh or ds_config.json must hold
    (["trainer.report_to=[tensorboard]", "name=mine"], ["report_to=", 'project="mine"', "TENSORBOARD_LOGGING_DIR"]),
    (["dataset.streaming=true", "dataset.limit=5", "trainer.max_steps=2"], ["streaming=True", "train.take(5)"]),
    (["dataset.path=a/b", "dataset.format=text", "dataset.revision=v1", "dataset.name=c", "dataset.split='train[:9]'"],
     ['load_dataset("a/b", "c", revision="v1", split="train[:9]")']),
    (["dataset.path=a/b", "dataset.columns.text=body"], ['{"body": "text"}', "choose_columns"]),
    (["model.attn_implementation=sdpa", "trainer.model_init_kwargs={use_cache: false}"],
     ['attn_implementation="sdpa"', "use_cache=False"]),
    (["model.revision=abc", "model.name_or_path=a/b"], ['"a/b", revision="abc"']),
    (["model.trust_remote_code=true"], ["trust_remote_code=True"]),
    (["tokenizer=chatml"], ['Path("chat_template.jinja")', "resize_token_embeddings", "modules_to_save"]),
    (["peft=none", "++peft.peft_type=LOHA", "++peft.r=3"], ['get_peft_config({"peft_type": "LOHA", "r": 3})']),
    (["launch.num_gpus=2", "launch=torchrun"], ["torchrun", "--nproc_per_node 2", 'ddp_backend="gloo"',
                                                "main_process_first"]),
    (["launch.num_gpus=2", "deepspeed=zero3"], ["deepspeed --num_gpus 2", "deepspeed.init_distributed"]),
    (["launch=local", "deepspeed=zero2", "launch.master_port=4444"], ["WORLD_SIZE=1", "MASTER_PORT=4444"]),
    (["launch.num_gpus=2", "deepspeed=zero3",
      "deepspeed.zero_optimization.stage3_gather_16bit_weights_on_model_save=false"],
     ['"stage3_gather_16bit_weights_on_model_save": true']),
    (["quantization=int8", "deepspeed=zero2", "launch.num_gpus=2"], ["Linear8bitLt", "load_in_8bit=True"]),
    (["quantization=nf4"], ["support_avx512bf16_for_cpu = False"]),
]  # fmt: skip


@pytest.mark.parametrize("case", HELD, ids=lambda c: " ".join(c[0]))
def test_a_setting_is_carried_over(case, plan_of, tmp_path):
    overrides, words = case
    verb.write_ejected(plan_of(*overrides), tmp_path / "out")
    made = {f.name: f.read_text() for f in (tmp_path / "out").iterdir()}
    compile(made["train.py"], "train.py", "exec")
    for word in words:
        assert any(word in content for content in made.values()), (word, made["train.py"], made["run.sh"])


def an_adapter(folder: Path, base: Path, weights: str) -> Path:
    folder.mkdir()
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (folder / weights).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return folder


def test_what_a_plain_script_cannot_do_is_refused(plan_of, base, tmp_path):
    odd = write_rows(tmp_path / "odd.jsonl", [{"a.b": "x", "1": "y"}])
    (tmp_path / "mine.py").write_text("")
    pickle = an_adapter(tmp_path / "pickle", base, "adapter_model.bin")
    tensors = an_adapter(tmp_path / "tensors", base, "adapter_model.safetensors")
    zero3 = ("deepspeed=zero3", "launch.num_gpus=2")
    stream = ("dataset.path=a/b", "dataset.streaming=true", "trainer.max_steps=2")
    cases = [
        (["launch.script=mine.py"], ["launch.script"]),
        ([f"peft.init_from={pickle}", "peft.init_from_pickle=true"], ["peft.init_from", "pickle"]),
        ([f"peft.init_from={tensors}", *zero3], ["peft.init_from", "ZeRO-3"]),
        ([f"dataset.path={odd}", "dataset.template.text='{a.b}'"], ["dataset.template", "a.b"]),
        ([*stream, "launch.script=mine.py"], ["dataset.format", "launch.script"]),
    ]
    for overrides, words in cases:
        with pytest.raises(KitError) as refused:
            verb.write_ejected(plan_of(*overrides), tmp_path / "out")
        said = str(refused.value)
        assert all(word in said for word in words), said
        assert all(p.fix for p in refused.value.problems) and not (tmp_path / "out").exists()
    verb.write_ejected(plan_of(f"peft.init_from={tensors}"), tmp_path / "out")
    assert (
        f"load_file({text.literal(str(tensors / 'adapter_model.safetensors'))})"
        in (tmp_path / "out" / "train.py").read_text()
    )


def test_a_script_that_would_be_too_long_is_packed_then_refused(plan_of):
    plan = plan_of(*script_fields(16), "dataset.test_size=8", "quantization=nf4", "tokenizer=chatml")
    code = script.render_script(plan)
    assert len(code.splitlines()) <= 80 and "# fmt: skip" in code
    endless = {f"x{i}": "y" * 110 for i in range(90)}
    with pytest.raises(KitError, match="more than 80"):
        script.render_script(plan.model_copy(update={"trainer": {**plan.trainer, **endless}}))


def script_fields(count: int) -> list[str]:
    """`field=value` of that many numeric fields, none at its default."""
    known = fields.field_tables()["SFTConfig"]
    numbers = [k for k, e in known.items() if e["kinds"] == ["float"] and "choices" not in e and "le" not in e]
    return [f"trainer.{k}=0.125" for k in numbers if k not in ("max_grad_norm",)][:count]


LITERALS = [
    "plain",
    'say "no"',
    "it's",
    "both ' and \"",
    "a\nb\t\\",
    "ünï ☃ \U0001f600",
    "\x00\x7f",
    "",
    "{x}",
    1,
    2e-05,
    None,
]
LITERALS += [True, [1, "a"], {"k": ["v", {"n": None}], "f": 1.5}, {}, []]


@pytest.mark.parametrize("value", LITERALS, ids=repr)
def test_values_are_the_same_when_python_reads_them(value):
    assert ast.literal_eval(text.literal(value)) == value


def test_the_command(plan_of, base, chat, tmp_path, capsys):
    plan = run_directory.create_run_directory(plan_of("name=made", "prompts=[a]"))
    run = plan.run_path.name
    assert cli.run_verb(["eject", run]) == DONE  # a run may be named without runs/
    assert "made-trl" in (said := capsys.readouterr().out) and "prompts" in said
    assert os.access("made-trl/run.sh", os.X_OK)
    code = Path("made-trl/train.py").read_text()
    assert cli.run_verb(["eject", run]) == REFUSED and "--overwrite" in capsys.readouterr().err
    assert cli.run_verb(["eject", run, "--overwrite"]) == DONE
    assert cli.run_verb(["eject", *plan.overrides, "elsewhere"]) == DONE
    assert Path("elsewhere/train.py").read_text() == code
    capsys.readouterr()
    for wrong, words in (
        ([], "nothing to eject"),
        (["nothing"], "there is no run nothing"),
        (["quickstart"], "recipe=quickstart"),
        ([run, "a", "b"], "a, b"),
        (["recipe=quickstart", "peft.rr=1"], "did you mean peft.r?"),
    ):
        assert cli.run_verb(["eject", *wrong]) == REFUSED
        assert words in capsys.readouterr().err
