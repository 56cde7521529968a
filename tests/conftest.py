"""What all tests share: a private cache inside the checkout, tiny models, DeepSpeed's operators built once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

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

settings.register_profile("suite", derandomize=True)  # the same examples in every run; tests/soak.py draws others
settings.load_profile("suite")


# In the order in which tests need them. async_io, for NVMe, takes longer than these together: tests/soak.py builds it.
OPERATORS = ["deepspeed_shm_comm", "cpu_adam", "fused_adam"]
LONGEST = ["test_trainer.py", "test_merge.py", "test_engines.py", "test_slurm_cluster.py", "test_two_nodes.py"]


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """tests/launch/ comes last: the operators that it needs compile meanwhile. The longest files come first of each
    part, so that two workers end together.
    """

    def turn(item: pytest.Item) -> tuple[bool, int]:
        place = LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
        return item.path.parent.name == "launch", place

    items.sort(key=turn)


COMPILE = """
import sys
from kit.launchers import ops
for name in sys.argv[1:]:
    ops.build_missing_ops([name], 1500, lambda line: print(line, file=sys.stderr), {"DS_ACCELERATOR": "cpu"})
"""
COMPILERS: list[subprocess.Popen[bytes]] = []


def pytest_collection_finish(session: pytest.Session) -> None:
    """A process of its own: tests change the environment of this one."""
    if any(item.get_closest_marker("launch") for item in session.items) and not session.config.option.collectonly:
        here = os.path.dirname(sys.executable)
        env = {**os.environ, "PATH": here + os.pathsep + os.environ["PATH"]}
        COMPILERS.append(subprocess.Popen([sys.executable, "-c", COMPILE, *OPERATORS], env=env, cwd=ROOT))


def pytest_sessionfinish(session: pytest.Session) -> None:
    from kit.launchers import ops

    for process in COMPILERS:  # one that is still at work ends with the tests
        ops.kill_tree(process.pid)


def compile_operators(names: list[str]) -> Path:
    """Where the operators are, once they are: a second caller waits for the first."""
    from kit.launchers import ops

    env = {"DS_ACCELERATOR": "cpu", "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    ops.build_missing_ops(names, 1500, lambda line: print(line, file=sys.stderr), env)
    return ops.extensions_dir()


@pytest.fixture(scope="session")
def ops_dir() -> Path:
    """TORCH_EXTENSIONS_DIR with what launches on CPU need."""
    return compile_operators(OPERATORS[:2])


@pytest.fixture(scope="session")
def adam_ops_dir() -> Path:
    """The same with fused_adam, for a DeepSpeed JSON that names AdamW itself."""
    return compile_operators(OPERATORS)


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
