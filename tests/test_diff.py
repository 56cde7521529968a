"""`kit diff A B`: what differs in the resolved plans, whatever names them, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit import api
from kit.cli import verbs as cli
from kit.errors import DONE, REFUSED
from kit.explain import diff
from kit.storage import run_directory

QUICK = "recipe=quickstart"
WRITTEN = f"{QUICK} dataset.path=x/y dataset.eval_path=null dataset.format=text trainer.assistant_only_loss=false"
# A, B, and every key that differs with both values and its class.
CASES = [
    ("quickstart", QUICK, {}),
    ("quickstart", f"{QUICK} trainer.weight_decay=0.0 peft.use_dora=false", {}),  # the libraries' own defaults
    ("quickstart", f"{QUICK} peft.r=8", {"peft.r": (16, 8, "identity")}),
    ("quickstart", f"{QUICK} trainer.save_steps=3", {"trainer.save_steps": (100, 3, "extendable")}),
    ("quickstart", f"{QUICK} trainer.adam_beta2=0.95", {"trainer.adam_beta2": (0.999, 0.95, "identity")}),
    (
        f"{QUICK} trainer.per_device_train_batch_size=4 global_batch_size=16", "quickstart",
        {"trainer.per_device_train_batch_size": (4, 16, "machine"),
         "trainer.gradient_accumulation_steps": (4, 1, "machine")},
    ),
    (
        f"{QUICK} deepspeed=zero2 launch=deepspeed launch.num_gpus=2 trainer.use_cpu=true",
        f"{QUICK} deepspeed=zero2 launch=deepspeed launch.num_gpus=2 trainer.use_cpu=true trainer.max_grad_norm=0.3",
        {"trainer.max_grad_norm": (1.0, 0.3, "identity"), "deepspeed.gradient_clipping": (1.0, 0.3, "identity")},
    ),
    (
        f"{WRITTEN} 'dataset.template={{text: \"a {{b}}\"}}'",
        f"{WRITTEN} 'dataset.template={{text: \"a {{c}}\"}}'",
        {"dataset.template.text": ("a {b}", "a {c}", "identity")},
    ),
]  # fmt: skip


def found(a: str, b: str) -> dict[str, tuple]:
    return {d["key"]: (d["a"], d["b"], d["class"]) for d in diff.compare_runs(a, b)["differences"]}


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {c[1]}"[:80])
def test_only_what_differs(case):
    a, b, expected = case
    assert found(a, b) == expected
    swapped = {key: (theirs, ours, kind) for key, (ours, theirs, kind) in expected.items()}
    assert found(b, a) == swapped


def test_a_section_that_one_side_lacks_is_listed_whole():
    keys = found("llama3_1_8b_lora", "llama3_1_8b_full_zero3")
    assert keys["peft.r"] == (16, None, "identity")
    assert keys["deepspeed.zero_optimization.stage"] == (None, 3, "machine")
    assert keys["deepspeed.zero_optimization.reduce_bucket_size"][1] == 4096 * 4096  # as resolved, not "auto"
    assert keys["world_size"] == (1, 8, "machine")


def test_text_and_json(capsys):
    assert (
        cli.run_verb(["diff", "quickstart", f"{QUICK} peft.r=8 trainer.adam_beta2=0.95 trainer.save_steps=3"]) == DONE
    )
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    assert ["peft.r", "16", "->", "8", "[identity]"] in lines
    assert ["trainer.adam_beta2", "0.999", "(default)", "->", "0.95", "[identity]"] in lines
    assert "another run (2 identity, 1 extendable)" in text
    assert cli.run_verb(["diff", "quickstart", f"{QUICK} trainer.save_steps=3", "--json"]) == DONE
    told = json.loads(capsys.readouterr().out)
    assert told["same_run"] and [d["key"] for d in told["differences"]] == ["trainer.save_steps"]
    assert cli.run_verb(["diff", "quickstart", "quickstart"]) == DONE
    assert "nothing differs" in capsys.readouterr().out


def test_long_values_are_shown_from_where_they_part():
    same = "the same words again and again " * 8
    texts = diff.format_values({"a": f"{same}here", "b": f"{same}there", "a_is_default": False, "b_is_default": False})
    assert texts[0].endswith("here") and texts[0] != texts[1]


def test_everything_that_can_name_a_run(base: Path, chat: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stock = [f"model.name_or_path={base}", f"dataset.path={chat}", "trainer.use_cpu=true", "name=made"]
    plan = run_directory.create_run_directory(api.compose(*stock, here=True))
    Path("mine.yaml").write_text(
        f"model:\n  name_or_path: {base}\ndataset:\n  path: {chat}\ntrainer:\n  use_cpu: true\nname: made\n"
    )
    run_directory.write_plan(plan)
    names = [plan.run_path.name, str(plan.run_path), f"{plan.run_dir}/plan.json", "mine.yaml", " ".join(stock)]
    for name in names:
        ours = found(names[0], name)
        assert all(key.startswith("base.") for key in ours), (name, ours)  # hashes of the weights: only a run has them
    assert found(names[0], " ".join([*stock, "peft.r=4"]))["peft.r"] == (16, 4, "identity")


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ("quikstart", "quickstart", ["quikstart", "did you mean quickstart?"]),
        ("quickstart", f"{QUICK} peft.rr=8", ["peft.rr", "did you mean peft.r?"]),
        ("quikstart", f"{QUICK} peft.rr=8", ["quikstart", "peft.rr", "2 problems"]),
        ("quickstart", "no.json", ["no.json"]),
        ("quickstart", "no.yaml", ["no.yaml"]),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(a, b, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run_verb(["diff", a, b]) == REFUSED
    said = capsys.readouterr().err
    assert all(word in said for word in words) and "Traceback" not in said, said
