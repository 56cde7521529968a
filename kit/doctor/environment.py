"""Variables and files that change a run without standing in its plan."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from kit.doctor.findings import OK, WARN, Finding
from kit.storage.hub_cache import TRUE_WORDS

# name (a pattern), what it does. The first that fits is taken; their values hold no secrets.
VARIABLE_EFFECTS = (
    (r"DS_ACCELERATOR", "DeepSpeed takes this accelerator instead of looking"),
    (r"DS_SKIP_CUDA_CHECK", "operators compile although nvcc and torch differ"),
    (r"DS_BUILD_\w+", "DeepSpeed's setup builds, or leaves out, operators"),
    (r"ACCELERATE_MIXED_PRECISION", "accelerate's own precision"),
    (r"ACCELERATE_USE_\w+", "accelerate switches an engine on"),
    (r"ACCELERATE_\w+", "accelerate reads it as a setting"),
    (r"FSDP_\w+", "accelerate reads it as an FSDP setting"),
    (r"RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR", "left by a launcher: one process believes in others"),
    (r"OMPI_COMM_WORLD_SIZE|PMI_SIZE", "MPI's count of processes; DeepSpeed may take it for its own"),
    (r"NCCL_(DEBUG|DEBUG_SUBSYS|DEBUG_FILE)", "NCCL talks more"),
    (r"NCCL_P2P_DISABLE|NCCL_SHM_DISABLE|NCCL_IB_DISABLE", "NCCL takes a slower way"),
    (r"NCCL_\w+", "NCCL reads it as a setting"),
    (r"TORCH_NCCL_\w+|TORCH_DISTRIBUTED_DEBUG", "torch's watchdog over NCCL"),
    (r"TORCH_EXTENSIONS_DIR", "operators are compiled there; the kit removes no dead locks in it"),
    (r"TORCH_CUDA_ARCH_LIST", "operators are compiled for these GPUs only"),
    (r"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|NVIDIA_TF32_OVERRIDE", "float32 products lose precision, or may not"),
    (r"TORCHDYNAMO_\w+|TORCH_COMPILE_\w+|TORCHINDUCTOR_\w+", "torch.compile reads it"),
    (r"PYTORCH_(CUDA_)?ALLOC_CONF", "torch's allocator; max_split_size_mb and the like cost memory"),
    (r"PYTORCH_NO_CUDA_MEMORY_CACHING|CUDA_LAUNCH_BLOCKING", "for debugging: training becomes several times slower"),
    (r"CUDA_DEVICE_ORDER", "GPUs are numbered in another order"),
    (r"CUBLAS_WORKSPACE_CONFIG", "deterministic products, slower"),
    (r"OMP_NUM_THREADS|MKL_NUM_THREADS", "threads per rank"),
    (r"LD_PRELOAD|LD_LIBRARY_PATH", "other libraries may be loaded than those of the wheels"),
    (r"PYTHONPATH", "modules found there come before installed ones"),
    (r"HF_ENDPOINT", "another Hub"),
    (r"WANDB_(DISABLED|MODE)", "wandb writes elsewhere, or nothing"),
)
HARMLESS_VARIABLES = re.compile(
    r"CUDA_DEVICE_ORDER|OMP_NUM_THREADS|MKL_NUM_THREADS|NCCL_DEBUG\w*|WANDB_\w+|LD_LIBRARY_PATH"
)


def check_variables(env: Mapping[str, str]) -> list[Finding]:
    """One finding for each variable of the table that is set."""
    findings = []
    for name, value in sorted(env.items()):
        change = next((change for pattern, change in VARIABLE_EFFECTS if re.fullmatch(pattern, name)), None)
        if change is not None:
            text = value if len(value) <= 80 else value[:77] + "..."
            level = OK if HARMLESS_VARIABLES.fullmatch(name) else WARN
            findings.append(
                Finding(level, "variable", f"{name}={text}: {change}", "" if level == OK else f"unset {name}")
            )
    if env.get("SLURM_NTASKS", "1") not in ("", "1") and "WORLD_SIZE" not in env:
        change = f"SLURM_NTASKS={env['SLURM_NTASKS']}: under srun each task would train alone"
        findings.append(
            Finding(WARN, "variable", change, "one task per node, the ranks through deepspeed or torchrun")
        )
    return findings or [Finding(OK, "variables", "none that changes training")]


def check_offline(env: Mapping[str, str], cache: Path) -> list[Finding]:
    """Switches that forbid the Hub; worth a warning where nothing is in the cache."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    flags = [f"{name}={env[name]}" for name in names if env.get(name, "").upper() in TRUE_WORDS]
    try:
        kept = sum(1 for _ in cache.glob("models--*"))
    except OSError:
        kept = 0
    if not flags:
        return [Finding(OK, "hub", f"may be asked; {kept} model(s) in {cache}")]
    fix = "unset it, or where there is a network: kit fetch recipe=NAME"
    return [
        Finding(OK if kept else WARN, "hub", f"{', '.join(flags)}; {kept} model(s) in {cache}", "" if kept else fix)
    ]


def check_leftovers(root: Path, here: Path, home: Path) -> list[Finding]:
    """Files that the deepspeed command reads unasked: a host list, variables for its ranks."""
    findings = []
    hosts = root / "job" / "hostfile"
    if (lines := setting_lines(hosts)) is not None:
        names = ", ".join(line.split()[0] for line in lines[:4]) or "nobody"
        problem = f"{hosts} names {names}: a bare `deepspeed` starts there, through ssh (`kit train` does not read it)"
        findings.append(Finding(WARN, "hostfile", problem, f"rm {hosts}, or deepspeed --hostfile=none"))
    for file in dict.fromkeys((here / ".deepspeed_env", home / ".deepspeed_env")):
        if (lines := setting_lines(file)) is not None:
            names = ", ".join(line.partition("=")[0] for line in lines[:6]) or "nothing"  # values may be secret
            findings.append(
                Finding(WARN, "deepspeed_env", f"{file} gives ranks on other nodes: {names}", f"rm {file}")
            )
    return findings or [Finding(OK, "leftovers", "no /job/hostfile, no .deepspeed_env")]


def setting_lines(file: Path) -> list[str] | None:
    """The lines of a file that say something, None where it cannot be read."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
