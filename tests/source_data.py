"""Small data of the schemas that the recipes read: varied rows with what real files hold and clean examples do not.

Empty and null fields, quotation marks, newlines, tabs, braces, Unicode of several scripts, and very long dialogues.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

ROWS = 5_000
LONG = 8_000  # characters of the longest dialogues
WORDS = (
    "pain fever since two days left arm after eating doctor tablet twice a day rest please advise blood test normal "
    "cough chest no worry drink water see me again swelling knee night sleep report attached thank you history age"
).split()
ODD = ['he said "it burns"', "it's", "line one\nline two", "a\ttab", "{not a column}", "50 % < 60 %", "頭が痛い",
       "боль", "naïve café", "🙂", "C:\\path", "<|endoftext|>", "‏עברית", "e\u0301"]  # fmt: skip


def phrase(draw: random.Random, words: int) -> str:
    text = " ".join(draw.choice(WORDS) for _ in range(words))
    return f"{text} {draw.choice(ODD)}" if draw.random() < 0.2 else text


def field(draw: random.Random, index: int, words: int) -> str | None:
    """Most are a few words; every 50th is empty, every 70th null, every 100th as long as a whole consultation."""
    if index % 50 == 7:
        return ""
    if index % 70 == 9:
        return None
    if index % 100 == 11:
        return phrase(draw, 2 * LONG)[:LONG]
    return phrase(draw, draw.randint(2, words))


def doctor_rows(n: int = ROWS) -> list[dict]:
    draw = random.Random(1)
    return [
        {"Description": field(draw, i + 3, 12), "Patient": field(draw, i, 60), "Doctor": field(draw, i + 31, 60)}
        for i in range(n)
    ]


def quote_rows(n: int = ROWS) -> list[dict]:
    draw = random.Random(2)
    return [
        {"quote": f"“{phrase(draw, draw.randint(3, 40))}”", "author": phrase(draw, 2), "tags": ["a", "b"][: i % 3]}
        for i in range(n)
    ]  # fmt: skip


def alpaca_rows(n: int = ROWS) -> list[dict]:
    draw = random.Random(3)
    return [
        {
            "instruction": phrase(draw, draw.randint(3, 20)),
            "input": "" if i % 3 else phrase(draw, draw.randint(1, 30)),
            "output": field(draw, i, 50) if i % 50 != 7 else phrase(draw, 3),
        }
        for i in range(n)
    ]


def chat_rows(n: int = 400) -> list[dict]:
    draw = random.Random(4)
    return [
        {
            "source": "made",
            "messages": [
                {"role": role, "content": phrase(draw, draw.randint(2, 40))}
                for _ in range(1 + i % 3)
                for role in ("user", "assistant")
            ],
        }
        for i in range(n)
    ]


def write_all(folder: Path) -> dict[str, Path]:
    """One file per Hub data set that a recipe names: {the recipe's dataset.path: the file}."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    doctor = folder / "dialogues.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(doctor_rows()), doctor)
    files = {"ruslanmv/ai-medical-chatbot": doctor}
    for name, rows in (("Abirate/english_quotes", quote_rows()), ("tatsu-lab/alpaca", alpaca_rows()),
                       ("trl-lib/Capybara", chat_rows())):  # fmt: skip
        files[name] = folder / f"{name.rpartition('/')[2]}.jsonl"
        files[name].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return files
