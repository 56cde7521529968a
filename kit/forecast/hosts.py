"""The machine that a run is planned for: its GPUs by their data sheets, host memory, and the links between them.

gpus.json, from data sheets: dense 16-bit TFLOP/s with float32 accumulation, MiB as nvidia-smi shows them, memory
bandwidth in TB/s, the link between GPUs in GB/s, both directions together (NVLink where the card has it, else PCIe).
`measured_tflops` is what matmuls were seen to reach.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.errors import KitError
from kit.system.hardware import Gpu

TABLE = Path(__file__).with_name("gpus.json")
ALIASES = {"v100": "v100_16", "a100": "a100_80", "rtx3090": "3090", "rtx4090": "4090", "rtx5090": "5090"}
KEY = "hardware"
EXAMPLES = "hardware=2x4090_128gb, hardware=8xa800 or hardware=4xv100_32"
PCIE_GB_S = 25.0  # of one GPU to host memory, one direction: what pinned copies reach over PCIe 4
HOST_GB_S = 200.0  # of a host's memory: eight channels of DDR4, more on newer servers


@dataclass(frozen=True)
class Host:
    """One node: `count` GPUs of a kind. memory_gb: of the host, in GB; None where nobody said it."""

    gpu: str
    tflops: float
    bf16: bool
    memory_gib: float  # of one GPU
    link_gb_s: float  # both directions together
    capability: tuple[int, int]
    count: int
    memory_gb: float | None = None

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """Return the GPUs as `kit.system.hardware.list_gpus` gives them."""
        return (Gpu(self.gpu, self.memory_gib, self.capability),) * self.count

    def describe(self) -> str:
        host = f", {self.memory_gb:g} GB of host memory" if self.memory_gb else ""
        return f"{self.count} x {self.gpu}, {self.memory_gib:.1f} GiB each{host}"


@functools.cache
def read_table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())
    return table


def parse_host(text: str) -> Host:
    """Read `[COUNTx]GPU[xCOUNT][_GIGABYTESgb]`, such as 2x4090_128gb or h100x8; the last part is host memory."""
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
        close = difflib.get_close_matches(name, [*read_table(), *ALIASES], 3, 0.5)
        known = f"did you mean {', '.join(close)}? " if close else ""
        problem = f"{KEY}={text} names no GPU that is known" if name not in read_table() else f"{count} GPUs"
        raise KitError(problem, KEY, f"{known}known: {', '.join(read_table())}; such as {EXAMPLES}")
    return make_host(read_table()[name], count, float(memory[1]) if memory else None)


def make_host(row: dict[str, Any], count: int, memory_gb: float | None) -> Host:
    return Host(
        gpu=row["name"], tflops=row["tflops"], bf16=row["bf16"], memory_gib=row["mib"] / 1024,
        link_gb_s=row["link_gb_s"], capability=tuple(row["capability"]), count=count, memory_gb=memory_gb,
    )  # fmt: skip


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
