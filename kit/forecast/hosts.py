"""The machine that a run is planned for: its GPUs by their data sheets, host memory, and the links between them.

gpus.json, from data sheets: dense 16-bit TFLOP/s with float32 accumulation, MiB as nvidia-smi shows them, memory
bandwidth in TB/s, the link between GPUs in GB/s, both directions together (NVLink where the card has it, else PCIe).
`measured_tflops` is what matmuls were seen to reach. A user's own machines are entries of a YAML file, with the fields
of Host as keys: hosts.yaml in --config-dir, or hardware=FILE.yaml:NAME.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from kit.errors import KitError, Problem
from kit.system.hardware import Gpu

TABLE = Path(__file__).with_name("gpus.json")
ALIASES = {"v100": "v100_16", "a100": "a100_80", "rtx3090": "3090", "rtx4090": "4090", "rtx5090": "5090"}
KEY = "hardware"
EXAMPLES = "hardware=2x4090_128gb, hardware=8xa800 or hardware=4xv100_32"
PCIE_GB_S = 25.0  # of one GPU to host memory, one direction: what pinned copies reach over PCIe 4
OWN = "hosts.yaml"  # in --config-dir
MATMUL_SHARE = 790 / 989  # of its data sheet that the H200 of the measured steps reaches in matmuls
HOST_GB_S = 200.0  # of a host's memory: eight channels of DDR4, more on newer servers


@dataclass(frozen=True)
class Host:
    """One node: `count` GPUs of a kind. memory_gb and what follows: None where nobody said it."""

    gpu: str
    tflops: float
    bf16: bool
    memory_gib: float  # of one GPU
    link_gb_s: float  # both directions together
    capability: tuple[int, int]
    count: int
    memory_gb: float | None = None  # of the host
    cores: int | None = None
    nvme_gb: float | None = None
    price: float | None = None  # of an hour of one GPU
    measured_tflops: float | None = None
    entry: str = ""  # its name in a file of the user's

    @property
    def rate(self) -> float:
        """Return the TFLOP/s from which step times follow: of the data sheet, or in proportion to measured ones."""
        return self.measured_tflops / MATMUL_SHARE if self.measured_tflops else self.tflops

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """Return the GPUs as `kit.system.hardware.list_gpus` gives them."""
        return (Gpu(self.gpu, self.memory_gib, self.capability),) * self.count

    def kind(self) -> str:
        """Name the GPU, with the entry that it is of."""
        return f"{self.entry}, {self.gpu}" if self.entry not in ("", self.gpu) else self.gpu

    def describe(self) -> str:
        known = ((self.memory_gb, "GB of host memory"), (self.cores, "cores"), (self.nvme_gb, "GB of NVMe"))
        host = "".join(f", {number:,.10g} {what}" for number, what in known if number)
        return f"{self.count} x {self.gpu}, {self.memory_gib:.1f} GiB each{host}"


@functools.cache
def read_table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())
    return table


def parse_host(text: str, config_dir: str | None = None) -> Host:
    """Read `[COUNTx]GPU[xCOUNT][_GIGABYTESgb]`, such as 2x4090_128gb or h100x8; the last part is host memory.

    Or an entry of the user's: its name in hosts.yaml of config_dir, or FILE.yaml:NAME.
    """
    if path := re.fullmatch(r"(.+\.ya?ml)(?::(.*))?", text.strip()):
        return find_own(Path(path[1]).expanduser(), path[2])
    file = Path(config_dir or "", OWN).expanduser()
    own = read_own(file) if config_dir and file.is_file() else {}
    if text.strip() in own:
        return make_own_host(file, text.strip(), own[text.strip()])
    word = text.strip().lower().replace("-", "_")
    memory = re.search(r"_(\d+)gb$", word)
    word = word[: memory.start()] if memory else word
    if before := re.fullmatch(r"(\d+)x(\w+)", word):
        count, name = int(before[1]), before[2]
    elif after := re.fullmatch(r"(\w+?)x(\d+)", word):
        count, name = int(after[2]), after[1]
    else:
        count, name = 1, word
    name = ALIASES.get(name, name)
    if name not in read_table() or not 0 < count <= 1024:
        close = difflib.get_close_matches(name, [*own, *read_table(), *ALIASES], 3, 0.5)
        known = f"did you mean {', '.join(close)}? " if close else ""
        problem = f"{KEY}={text} names no GPU that is known" if name not in read_table() else f"{count} GPUs"
        raise KitError(problem, KEY, f"{known}known: {', '.join([*own, *read_table()])}; such as {EXAMPLES}")
    return make_host(read_table()[name], count, float(memory[1]) if memory else None)


def make_host(row: dict[str, Any], count: int, memory_gb: float | None) -> Host:
    return Host(
        gpu=row["name"], tflops=row["tflops"], bf16=row["bf16"], memory_gib=row["mib"] / 1024,
        link_gb_s=row["link_gb_s"], capability=tuple(row["capability"]), count=count, memory_gb=memory_gb,
        measured_tflops=row.get("measured_tflops"),
    )  # fmt: skip


# ---- a user's own machines ----


def read_own(file: Path) -> dict[str, dict[str, Any]]:
    """Read the entries of a user's file; KitError where it has none."""
    import yaml

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = (
            "is not there"
            if isinstance(error, FileNotFoundError)
            else f"cannot be read: {' '.join(str(error).split())}"
        )
        raise KitError(f"{file} {why}", KEY, "a YAML file of machines, from where you stand") from None
    if not isinstance(found, dict) or not found or not all(isinstance(entry, dict) for entry in found.values()):
        raise KitError(f"{file} must hold machines by name", str(file), "lab1:\n  gpu: 4090\n  count: 2")
    return {str(name): entry for name, entry in found.items()}


def find_own(file: Path, name: str | None) -> Host:
    """Return the machine of a file by its name, which a file of one need not say."""
    entries = read_own(file)
    name = next(iter(entries)) if not name and len(entries) == 1 else name
    if name not in entries:
        fix = " or ".join(f"{KEY}={file}:{n}" for n in difflib.get_close_matches(name or "", entries, 3, 0) or entries)
        raise KitError(f"{file} has no machine {name}" if name else f"{file} has several machines", KEY, fix)
    return make_own_host(file, name, entries[name])


def make_own_host(file: Path, name: str, entry: dict[str, Any]) -> Host:
    """Make the host of an entry: of a GPU of the table, its own figures in place of it; KitError with all problems."""
    kinds = {field.name: str(field.type).partition(" ")[0] for field in fields(Host)}
    del kinds["capability"], kinds["entry"]
    problems = []
    for key, value in entry.items():
        if key not in kinds:
            close = difflib.get_close_matches(str(key), kinds, 1, 0.5)
            fix = f"did you mean {close[0]}?" if close else f"one of {', '.join(kinds)}"
            problems.append(Problem(f"a machine has no key {key}", f"{file}: {name}.{key}", fix))
        elif wanted := wrong_value(key, kinds[key], value):
            problems.append(Problem(f"{key} is {value!r}", f"{file}: {name}.{key}", f"{key}: {wanted}"))
    gpu = str(entry.get("gpu", name))
    word = gpu.lower().replace("-", "_").replace(" ", "_")
    row = read_table().get(ALIASES.get(word, word))
    missing = [key for key in ("tflops", "memory_gib", "link_gb_s", "bf16") if key not in entry]
    if row is None and missing:
        close = difflib.get_close_matches(word, [*read_table(), *ALIASES], 3, 0.5)
        fix = (f"did you mean {' or '.join(close)}? " if close else "") + f"else give {', '.join(missing)}"
        text = f"{gpu} names no GPU that is known, and the entry has not all of its figures"
        problems.append(Problem(text, f"{file}: {name}.gpu", fix))
    if problems:
        raise KitError(problems)
    given = {key: value for key, value in entry.items() if key != "gpu"} | {"entry": name}
    if "bf16" in entry:
        given["capability"] = (8, 0) if entry["bf16"] else (7, 0)  # by which a composed run takes bfloat16 or float16
    if row is None:
        return Host(**{"gpu": gpu, "count": 1, **given})
    if "tflops" in entry:
        given.setdefault("measured_tflops", None)
    return replace(make_host(row, 1, None), **given)


def wrong_value(key: str, kind: str, value: Any) -> str:
    """Say what a value of an entry should be; "" where it is that."""
    if kind == "str":
        return "" if isinstance(value, str | int) and not isinstance(value, bool) else "a name, such as 4090"
    if kind == "bool":
        return "" if isinstance(value, bool) else "true or false"
    whole = kind == "int"
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    least, most = 0 if key in ("price", "nvme_gb") else 1e-9, 1024 if key == "count" else 1e9
    what = f"a {'whole ' if whole else ''}number{' above 0' if least else ' from 0 on'}"
    return "" if number and least <= value <= most else what


def find_host(gpus: tuple[Gpu, ...], memory_gb: float) -> Host | None:
    """Return this machine's host by the name of its GPUs; None where it has none, or of a kind that is not known."""
    if not gpus:
        return None
    smallest = min(gpus, key=lambda gpu: gpu.memory_gb)
    key = find_key(smallest)
    if key is None:
        return None
    row = read_table()[key] | {"name": smallest.name, "mib": smallest.memory_gb * 1024}
    return make_host(row, len(gpus), memory_gb)


def find_key(gpu: Gpu) -> str | None:
    """Return the table's key of a GPU, by its name and memory; None for one that it lacks."""
    words = set(re.findall(r"[a-z]*\d+[a-z]*", gpu.name.lower()))
    keys = [key for key in read_table() if key.partition("_")[0] in words]
    return min(keys, key=lambda key: abs(read_table()[key]["mib"] / 1024 - gpu.memory_gb), default=None)
