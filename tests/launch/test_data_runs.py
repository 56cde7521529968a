"""Strangers' data through real launches of two processes: several formats mixed, packed, dropped rows, a stream."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import tiny

from launch import harness

pytestmark = pytest.mark.launch
TWO = ("launch=torchrun", "launch.num_gpus=2")
SHORT = ("dataset.test_size=null", "trainer.eval_strategy=no", "trainer.load_best_model_at_end=false",
         "trainer.save_strategy=no")  # fmt: skip
BAD = {"messages": [{"role": "critic", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def sharegpt(rows: list[dict]) -> list[dict]:
    names = {"user": "human", "assistant": "gpt"}
    turns = [[{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]] for row in rows]
    return [{"conversations": conversation} for conversation in turns]


def test_a_mix_is_counted_packed_and_evaluated(work, base):
    """ShareGPT in a .gz beside Alpaca: bad rows dropped and counted, answers alone in the loss, documents apart."""
    chats = sharegpt(tiny.chat_rows(60))
    chats[17]["conversations"][0]["from"] = "critic"
    (work / "chats.jsonl.gz").write_bytes(gzip.compress(lines(chats)))
    pairs = [
        {"instruction": p["prompt"], "input": "", "output": p["completion"].strip()} for p in tiny.prompt_rows(30)
    ]
    (work / "pairs.json").write_text(json.dumps(pairs))
    mix = f"dataset.mix=[{{path: {work / 'chats.jsonl.gz'}}}, {{path: {work / 'pairs.json'}, limit: 20}}]"
    chosen = harness.overrides(
        base, Path("null"), work / "mix", mix, *TWO, *SHORT, "dataset.path=null", "dataset.train_on=assistant_turns",
        "dataset.test_size=0.1", "dataset.on_bad_row=drop", "dataset.max_bad_rows=1", "trainer.packing=true",
    )  # fmt: skip
    done = harness.kit("train", *chosen, cwd=work)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = harness.the_run(work / "mix")
    data = json.loads((run / "metrics.json").read_text())["data"]
    train, held_out = data["train"], data["validation"]
    assert train["kept"] + sum(train["dropped"].values()) == train["read"]
    assert train["read"] + held_out["read"] == 80
    assert sum(sum(part["dropped"].values()) for part in data.values()) == 1
    assert sum(train["sources"].values()) == train["kept"] and len(train["sources"]) == 2
    assert 0 < train["trained"] < train["tokens"] and train["packed"] < train["kept"]
    assert "the role 'critic' is not known" in done.stdout and "documents stay apart" in done.stdout
    scored = harness.kit("eval", str(run), "--limit", "4", cwd=work)
    assert scored.returncode == 0, scored.stdout + scored.stderr
    harness.assert_nothing_left(run)


def test_a_bad_row_is_refused_on_every_rank_before_the_model_is_loaded(work, base):
    rows = tiny.chat_rows(300)  # more than what the check looks at
    rows.insert(250, BAD)
    (work / "late.jsonl").write_bytes(lines(rows))
    done = harness.kit(
        "train", *harness.overrides(base, work / "late.jsonl", work / "late", *TWO, *SHORT), cwd=work
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    assert f"{work / 'late.jsonl'} row 251: turn 1: the role 'critic' is not known" in done.stderr
    run = harness.the_run(work / "late")
    assert harness.status(run)["state"] == "failed" and not (run / "adapter").exists()
    harness.assert_nothing_left(run)


def test_a_stream_stops_with_a_checkpoint_at_a_refused_row(work, base):
    """The row stands behind those that are checked first; with on_bad_row=drop the same run goes to its end."""
    rows = tiny.chat_rows(400)
    rows[260] = BAD  # the command itself looks at the first 200
    (work / "stream.jsonl").write_bytes(lines(rows))
    script = f"launch.script={Path(__file__).with_name('streamed.py')}"
    stream = (*TWO, *SHORT, "dataset.streaming=true", script, "trainer.max_steps=40")
    refused = harness.kit(
        "train", *harness.overrides(base, work / "stream.jsonl", work / "refused", *stream), cwd=work
    )  # fmt: skip
    assert refused.returncode == 2 and "row 261" in refused.stderr, refused.stderr[-3000:]
    run = harness.the_run(work / "refused")
    (checkpoint,) = (run / "checkpoints").glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    counted = state["stateful_callbacks"]["StreamCallback"]["attributes"]["read"]["train"]
    assert counted["kept"] + 1 == counted["read"] and 260 < counted["read"] < 400
    drop = ("dataset.on_bad_row=drop", "dataset.max_bad_rows=2")
    done = harness.kit(
        "train", *harness.overrides(base, work / "stream.jsonl", work / "dropped", *stream, *drop), cwd=work
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    train = json.loads((harness.the_run(work / "dropped") / "metrics.json").read_text())["data"]["train"]
    assert train["dropped"] == {"turn N: the role 'critic' is not known: dataset.roles.critic=user": 1}
    assert train["kept"] + 1 == train["read"] > 260
