"""ds_configs/*.json run unchanged in an ordinary HF Trainer script: all in one launch of two processes.

`python tests/soak.py --only nvme` runs zero3_nvme.json beside them: its operator takes minutes to compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kit.launchers.command import free_port

pytestmark = pytest.mark.launch
ROOT = Path(__file__).parents[2]
NAMES = ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
NVME = "zero3_nvme"
CLOSE = 2e-5  # the losses of plain ZeRO-1: sharding and offload change nothing but memory


def run_all(configs: list[str], output: str) -> None:
    """Inside the launch: the script's own main() once per config, with the libraries' singletons reset between."""
    from accelerate.state import AcceleratorState, GradientState
    from plain_trainer import main
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    losses = {}
    for config in configs:
        losses[Path(config).stem] = main(config, f"{output}/out")
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
    Path(output, f"losses-{os.environ['RANK']}.json").write_text(json.dumps(losses))


def launch(ops: Path, work: Path, names: list[str]) -> list[dict[str, list[float]]]:
    """Each rank's losses, by config. Only the NVMe folder is this machine's own."""
    files = []
    for name in names:
        file = ROOT / "ds_configs" / f"{name}.json"
        if name == NVME:
            text = file.read_text().replace('"/local_nvme"', json.dumps(str(work / "nvme")))
            file = work / file.name
            file.write_text(text)
        files.append(str(file))
    here = str(Path(sys.executable).parent)
    command = [f"{here}/deepspeed", "--num_gpus", "2", "--no_local_rank", "--master_port", str(free_port()), __file__]
    env = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(ops),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{here}:{os.environ['PATH']}",
    }
    command += [str(work), *files]
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return [json.loads((work / f"losses-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def losses(ops_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[float]]]:
    return launch(ops_dir, tmp_path_factory.mktemp("ds_configs"), NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_runs_unchanged(losses: list[dict[str, list[float]]], name: str) -> None:
    assert losses[0][name] == losses[1][name]
    assert len(losses[0][name]) == 3
    assert losses[0][name] == pytest.approx(losses[0]["zero1"], abs=CLOSE)


def test_every_config_is_run() -> None:
    assert sorted(f.stem for f in (ROOT / "ds_configs").glob("*.json")) == sorted([*NAMES, NVME])


if __name__ == "__main__":
    run_all(sys.argv[2:], sys.argv[1])
