"""What all tests share: a private cache inside the checkout, tiny models, DeepSpeed's operators built once."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_DATASETS_CACHE", str(ROOT / ".kit-cache" / "datasets"))
os.environ["NO_COLOR"] = "1"
# Operators go into the kit's own folder in ~/.cache, named after CPU, environment and versions: compiled once.
os.environ.pop("TORCH_EXTENSIONS_DIR", None)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite is the same on every machine: CPU processes


OPERATORS = ["deepspeed_shm_comm", "cpu_adam", "async_io"]


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Launches come last: the fast tests run while DeepSpeed's operators are compiled on the other core."""
    items.sort(key=lambda item: item.get_closest_marker("launch") is not None)


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(item.get_closest_marker("launch") for item in session.items) and not session.config.option.collectonly:
        threading.Thread(target=compile_operators, daemon=True).start()


def compile_operators() -> Path:
    """What CPU launches need, compiled where it is missing; a second caller waits for the first."""
    from kit.launchers import ops

    env = {"DS_ACCELERATOR": "cpu", "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    with COMPILING:
        ops.prepare(OPERATORS, 1500, lambda line: print(line, file=sys.stderr), env)
    return ops.extensions_dir()


COMPILING = threading.Lock()


@pytest.fixture(scope="session")
def ops_dir() -> Path:
    """TORCH_EXTENSIONS_DIR with DeepSpeed's CPU operators in it."""
    return compile_operators()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama folder: float32, untied, with tokenizer and chat template."""
    import tiny

    return tiny.make_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat data set of 96 rows as JSON lines."""
    import tiny

    return write_rows(tmp_path_factory.mktemp("data") / "chat.jsonl", tiny.chat_rows(96))


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
