"""Python and the packages, against what the kit was tested with (tested.json, kept equal to constraints.txt)."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from kit.doctor.findings import BAD, OK, WARN, Finding
from kit.system.dependencies import installed_version, release_numbers

TESTED_VERSIONS = Path(__file__).with_name("tested.json")
VersionOf = Callable[[str], str | None]


def load_tested_versions() -> dict[str, Any]:
    return json.loads(TESTED_VERSIONS.read_text(encoding="utf-8"))


def is_in_range(version: str, ranges: str) -> bool:
    """Whether a version lies in a range such as ">=1.16,<2"; trailing zeros do not count."""
    for part in ranges.split(","):
        sign, bound = re.fullmatch(r"(>=|<)([\d.]+)", part.strip()).groups()  # type: ignore[union-attr]
        have, want = release_numbers(version), release_numbers(bound)
        width = max(len(have), len(want))
        have, want = have + (0,) * (width - len(have)), want + (0,) * (width - len(want))
        if (have < want) if sign == ">=" else (have >= want):
            return False
    return True


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> list[Finding]:
    text, allowed = ".".join(map(str, version)), load_tested_versions()["python"]
    if is_in_range(text, allowed):
        return [Finding(OK, "python", f"{text} ({sys.executable})")]
    return [Finding(BAD, "python", f"{text}; the kit runs on {allowed}", "make a .venv with python3.11, 3.12 or 3.13")]


def check_packages(version_of: VersionOf = installed_version) -> list[Finding]:
    """One finding for all that are as tested, one for each that is not."""
    table = load_tested_versions()
    train: dict[str, dict[str, str]] = table["train"]
    findings, as_tested = [], []
    absent = [name for name in train if version_of(name) is None]
    for name, row in {**table["packages"], **train}.items():
        version = version_of(name)
        pin = f"pip install '{name}=={row['tested']}'"
        if version is None:
            if name in train and len(absent) == len(train):
                continue  # the bare install: said once, below
            findings.append(Finding(BAD, name, "is not installed", pin))
        elif not is_in_range(version, row["range"]):
            findings.append(Finding(BAD, name, f"{version}; the kit needs {row['range']}", pin))
        elif release_numbers(version) != release_numbers(row["tested"]):
            findings.append(
                Finding(WARN, name, f"{version} is allowed ({row['range']}); tested is {row['tested']}", pin)
            )
        else:
            as_tested.append(f"{name} {version}")
    if as_tested:
        findings.insert(0, Finding(OK, "packages", f"as tested: {', '.join(as_tested)}"))
    if len(absent) == len(train):
        findings.append(
            Finding(
                WARN, "packages", "the bare install: it checks, plans and submits, and cannot train here",
                "pip install torch, then --no-build-isolation 'finetune-kit[train]'",
            )
        )  # fmt: skip
    return findings


def cuda_of_torch() -> str | None:
    """The CUDA version that the installed torch was built with, "" for a CPU build, None where torch is not here."""
    try:
        torch = metadata.distribution("torch")
    except metadata.PackageNotFoundError:
        return None
    try:
        text = Path(str(torch.locate_file("torch/version.py"))).read_text(encoding="utf-8")
    except OSError:
        text = ""
    return parse_cuda_version(
        torch.version, text, installed_version("nvidia-cuda-runtime") or installed_version("nvidia-cuda-runtime-cu12")
    )


def parse_cuda_version(version: str, version_py: str, runtime: str | None) -> str:
    """From torch/version.py, else from a version such as 2.13.0+cu130, else from the CUDA runtime's own package."""
    if match := re.search(r"^cuda\b[^=\n]*=\s*(?:'([\d.]+)'|None)", version_py, re.M):
        return match[1] or ""
    if tag := re.search(r"\+cu(\d+)(\d)$", version):
        return f"{tag[1]}.{tag[2]}"
    if "+cpu" in version or runtime is None:
        return ""
    return ".".join(runtime.split(".")[:2])
