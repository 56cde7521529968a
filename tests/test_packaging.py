"""The wheel as users install it: complete, usable from anywhere, and without anything that it does not declare."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from soak import make_inputs

from kit.errors import DONE, ENVIRONMENT, REFUSED

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
RECIPES = sorted(f.stem for f in (ROOT / "recipes").glob("*.yaml"))

# Stands before site-packages: an import that a bare install could not serve fails as it would there.
HOOK = """
import json, os, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

ABSENT = set(json.loads(os.environ["KIT_TEST_ABSENT"]))
sys.meta_path.insert(0, Absent())
"""


def run(argv: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(argv, cwd=cwd, env={**clean, **env}, capture_output=True, text=True, timeout=180)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """A wheel made from the checkout, and one made from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    for options, folder in ((["--wheel"], "direct"), ([], "through-sdist")):
        argv = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(out / folder), str(ROOT)]
        done = run(argv, out)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next((out / "direct").glob("*.whl")), next((out / "through-sdist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """A folder with the wheel and nothing else in it."""
    target = tmp_path_factory.mktemp("target")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(built[0]),
    ]
    done = run(pip, target)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as z:
        return sorted(n for n in z.namelist() if ".dist-info/" not in n)


def test_the_wheel_holds_the_package_and_its_configuration(built):
    names = names_in(built[0])
    assert len(names) == len(set(names)), "a file is in the wheel twice"
    expected = {f"kit/{f.relative_to(ROOT / 'kit')}" for f in (ROOT / "kit").rglob("*.py")} | {
        "kit/schema/fields.json",
        "kit/inspection/architectures.json",
        "kit/inspection/parameters.json",
        "kit/forecast/activations.json",
        "kit/forecast/gpus.json",
        "kit/config/rules/explanations.yaml",
        "kit/doctor/tested.json",
        "kit/explain/plan_page.html",
    }
    expected |= {f"kit/ds_configs/{f.name}" for f in (ROOT / "ds_configs").glob("*.json")}
    expected |= {f"kit/hydra_conf/recipe/{f.relative_to(ROOT / 'recipes')}" for f in (ROOT / "recipes").rglob("*.*")}
    groups = [p for p in (ROOT / "hydra_conf").iterdir() if p.is_dir() and not p.is_symlink()]
    expected |= {f"kit/hydra_conf/{p.name}/{f.name}" for p in groups for f in p.glob("*.yaml")} | {
        "kit/hydra_conf/train.yaml",
        "kit/hydra_conf/tokenizer/chatml.jinja",
    }
    assert len(groups) >= 9 and len(RECIPES) >= 2
    assert sorted(expected - set(names)) == []
    others = [n for n in names if n not in expected and not n.endswith("README.md")]
    assert others == [], "the wheel holds what is no part of the package"
    with zipfile.ZipFile(built[0]) as z:
        info = [n for n in z.namelist() if n.endswith("dist-info/METADATA")]
        text = z.read(info[0]).decode()
    assert "Requires-Dist: torch" not in re.sub(r"(?m)^.*extra ==.*$", "", text)


def test_the_sdist_makes_the_same_wheel(built):
    """It has the recipes through a link in one place and as a folder in another."""
    assert names_in(built[0]) == names_in(built[1])


def test_an_installed_kit_checks_and_lists(installed, tmp_path):
    """From a foreign folder, with the checkout out of sight although the environment knows it (editable install)."""
    env = {"PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""}
    where = run(
        [
            sys.executable,
            "-P",
            "-c",
            "import kit, kit.system.paths; print(kit.__file__); print(kit.system.paths.CONF)",
        ],
        tmp_path,
        **env,
    )
    assert all(Path(line).is_relative_to(installed) for line in where.stdout.split()), where.stdout + where.stderr
    done = run([sys.executable, "-P", "-m", "kit", "check", "recipe=quickstart", "--json"], tmp_path, **env)
    assert done.returncode == DONE, done.stderr
    plan = json.loads(done.stdout)["plan"]
    assert Path(plan["dataset"]["path"]).is_relative_to(installed)  # the data came with the wheel
    assert str(ROOT) not in done.stdout
    listed = run([sys.executable, "-P", "-m", "kit", "list"], tmp_path, **env)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == RECIPES


def requirements(*extras: str) -> list[Requirement]:
    return [Requirement(text) for text in [*PROJECT["dependencies"], *(r for e in extras for r in EXTRAS[e])]]


def closure(start: list[Requirement]) -> set[str]:
    """Canonical names of the requirements and of all that they need here, as far as it is installed."""
    found: set[str] = set()
    pending = [(canonicalize_name(r.name), extra) for r in start for extra in ["", *r.extras]]
    seen = set()
    while pending:
        name, extra = pending.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                pending += [(canonicalize_name(need.name), e) for e in ["", *need.extras]]
    return found


BARE = """
import json, sys
from kit.cli import verbs as cli

codes = []
for argv in json.loads(sys.argv[1]):
    print("#", *argv, file=sys.stderr)
    codes.append(cli.run_verb(argv))
print(json.dumps(codes))
"""


def test_a_bare_install_checks_lists_and_refuses(installed, tmp_path):
    """Hidden is all that the dependencies of the bare package do not bring: torch, and what is declared nowhere."""
    bare = closure(requirements())
    assert {"hydra-core", "omegaconf", "pydantic"} <= bare and "torch" not in bare
    own = {"kit", *sys.stdlib_module_names}
    provided = metadata.packages_distributions()
    absent = {
        module
        for module, owners in provided.items()
        if module not in own and not any(canonicalize_name(owner) in bare for owner in owners)
    }
    assert {"torch", "transformers", "datasets", "numpy"} <= absent
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    (tmp_path / "bad.yaml").write_text("trainer: [")
    lines = {
        DONE: [["--help"], ["list"], ["list", "peft"], *(["check", f"recipe={name}"] for name in RECIPES)],
        REFUSED: [
            ["check", "recipe=quickstart", "trainer.learning_rat=1"], ["check", "recipe=quickstrat"], ["check", "a b"],
            ["check", "recipe=quickstart", "dataset.path=x.parquet"], ["check", "bad.yaml"], ["resume", "nothing"],
            ["train", "recipe=quickstart", "trainer.seed=one"], ["nonsense"],
        ],
    }  # fmt: skip
    env = {"PYTHONPATH": os.pathsep.join([str(hook), str(installed)]), "KIT_TEST_ABSENT": json.dumps(sorted(absent))}
    hidden = run([sys.executable, "-P", "-c", "import torch"], tmp_path, **env)
    assert "No module named 'torch'" in hidden.stderr, "the hook hides nothing"
    for expected, commands in lines.items():
        done = run([sys.executable, "-P", "-c", BARE, json.dumps(commands)], tmp_path, **env)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout.splitlines()[-1]) == [expected] * len(commands), done.stderr
        assert "Traceback" not in done.stderr and "No module named" not in done.stderr, done.stderr


def test_training_on_a_bare_install_names_what_is_missing(installed, tmp_path):
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    stack = ["torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "safetensors", "numpy"]
    env = {"PYTHONPATH": os.pathsep.join([str(hook), str(installed)]), "KIT_TEST_ABSENT": json.dumps(stack)}
    train = ["train", *make_inputs(tmp_path), "trainer.use_cpu=true", "launch=local"]
    done = run([sys.executable, "-P", "-m", "kit", *train], tmp_path, **env)
    assert done.returncode == ENVIRONMENT, done.stderr
    assert "torch" in done.stderr and "pip install" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if line.strip() and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in pinned), (
        "name==version, nothing else"
    )
    return {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in pinned}


def test_constraints_pin_every_package():
    pinned = pins()
    assert pinned["torch"] == "2.13.0"
    declared = requirements(*EXTRAS)
    for requirement in declared:
        name = canonicalize_name(requirement.name)
        assert name in pinned, name
        assert requirement.specifier.contains(pinned[name]), f"{requirement} does not admit {pinned[name]}"
    # A CUDA build of torch brings its own libraries, pinned by torch itself; pip's tools come with Python.
    by_torch = re.compile(r"nvidia-.*|cuda-.*|triton|pip|setuptools|wheel")
    assert sorted(n for n in closure(declared) - pinned.keys() if not by_torch.fullmatch(n)) == []


def test_no_file_of_the_set_up_names_a_host_or_a_folder():
    for name in ("constraints.txt", "pyproject.toml", "Makefile"):
        text = (ROOT / name).read_text()
        assert not re.search(r"https?://|file:|index-url|find-links|trusted-host|--hash", text), name
        assert not re.search(r"(?m)(^|[\s=\"'@])/(home|root|tmp|mnt|work|opt)/", text), name
