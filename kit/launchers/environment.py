"""Which variables of the environment may reach the ranks, so that the plan is what happens.

Three classes, in one table: what transformers, accelerate, TRL, PEFT and DeepSpeed read in Python and a plan holds is
cleared, and said (transformers#29510); what sets up libraries, networks and trackers is passed and recorded; what
changes numbers is passed, said, recorded and compared at resume. Every door passes here: the command that launches,
and each rank before it imports torch. tests/test_environment.py looks for new names in the libraries' sources.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping, MutableMapping
from typing import Literal

from kit.schema.run_plan import RunPlan
from kit.system.secrets import is_secret

FILE = "environment.json"  # in the run directory: what rank 0 was started with
Class = Literal["cleared", "passed", "numeric", "launcher", "unrecorded"]
HIDDEN = "(not recorded: it looks like a secret)"

# The first row whose pattern fits decides; a name that fits none is unrecorded.
TABLE: tuple[tuple[Class, str, str], ...] = (
    ("passed", "what is shown and logged", "ACCELERATE_LOG_LEVEL ACCELERATE_ENABLE_RICH ACCELERATE_DEBUG_*"),
    ("passed", "how DeepSpeed's operators are compiled, and for whom the deepspeed command exports",
     "DS_BUILD_* DS_SKIP_CUDA_CHECK DS_IGNORE_CUDA_DETECTION DS_NVCC_THREADS DS_DEBUG_CUDA_BUILD"
     " DS_EVOFORMER_GPU_ARCH DS_ENV_FILE DS_ENABLE_NINJA"),
    ("cleared", "precision, batch, engine, device and offload stand in the plan",
     "ACCELERATE_* FSDP_* MEGATRON_LM_* PARALLELISM_CONFIG_* DS_* FORK_LAUNCHED XLA_USE_BF16 XLA_DOWNCAST_BF16"
     " DEEPSPEED_USE_HPU PT_HPU_LAZY_MODE"),
    ("cleared", "options of torchrun, which the kit types itself", "PET_*"),
    ("cleared", "SageMaker's own model and data parallelism", "SM_HP_MP_PARAMETERS SM_FRAMEWORK_PARAMS"),
    ("cleared", "model.trust_remote_code alone allows it", "TRUST_REMOTE_CODE"),
    ("cleared", "ranks that another launcher has counted; RANK and its companions are set from them before",
     "PMI_RANK PMI_SIZE MV2_COMM_WORLD_* MPI_LOCALRANKID MPI_LOCALNRANKS"),
    ("numeric", "precision and kernels of matrix products on NVIDIA GPUs",
     "NVIDIA_TF32_OVERRIDE TORCH_ALLOW_TF32_CUBLAS_OVERRIDE CUBLAS_WORKSPACE_CONFIG CUBLASLT_WORKSPACE_SIZE"
     " DISABLE_ADDMM_CUDA_LT TORCH_BLAS_PREFER_* TORCH_LINALG_PREFER_* TORCH_CUDNN_* CUDNN_*"),
    ("numeric", "which kernels the libraries choose",
     "FLASH_ATTENTION_DETERMINISTIC TRANSFORMERS_SDPA_FORCE_GQA TRANSFORMERS_DISABLE_DEEPGEMM_LINEAR"
     " NPU_FA2_SPARSE_MODE USE_HUB_KERNELS TORCH_COMPILE_DISABLE TORCHDYNAMO_DISABLE HCCL_DETERMINISTIC"),
    ("numeric", "arithmetic of CPU kernels",
     "MKL_CBWR MKL_ENABLE_INSTRUCTIONS ONEDNN_MAX_CPU_ISA DNNL_MAX_CPU_ISA ONEDNN_DEFAULT_FPMATH_MODE"
     " DNNL_DEFAULT_FPMATH_MODE ATEN_CPU_CAPABILITY"),
    ("numeric", "the order in which gradients are summed", "NCCL_ALGO NCCL_PROTO"),
    ("launcher", "who the ranks are: torchrun, deepspeed, srun, mpirun and the cloud's batch systems set it",
     "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_SIZE CROSS_RANK CROSS_SIZE NODE_RANK NPROC MASTER_ADDR"
     " MASTER_PORT GROUP_RANK GROUP_WORLD_SIZE ROLE_* TORCHELASTIC_* OMPI_* PMIX_* SLURM_* AZ_BATCH* AZUREML_*"
     " DLTS_JOB_ID DLWS_JOB_ID SM_TRAINING_ENV SMDATAPARALLEL_LOCAL_RANK TPU_NAME PJRT_DEVICE KIT_*"),
    ("passed", "devices, communication and memory",
     "CUDA_* NVIDIA_* HIP_* ROCR_* ZE_AFFINITY_MASK ASCEND_* NCCL_* GLOO_* UCX_* FI_* MORI_* RDMAV_* TORCH* PYTORCH_*"
     " AUTOEP_* DEEPSPEED_* XPU_EVENT_KL3_ENABLE USE_TORCH_XLA"),
    ("passed", "threads", "OMP_* MKL_* KMP_* GOMP_* OPENBLAS_* NUMEXPR_*"),
    ("passed", "libraries: caches, offline mode, logging",
     "HF_* HUGGINGFACE_* TRANSFORMERS_* TOKENIZERS_* DATASETS_* SAFETENSORS_* TRL_* PEFT_* BNB_* BITSANDBYTES_*"
     " TRITON_* VLLM_LOGGING_LEVEL DISABLE_LOGS_WHILE_COMPILING LOGGER_METHODS_TO_EXCLUDE_FROM_DISABLE TQDM_*"
     " NETWORK_DEBUG_REPORT* XDG_CACHE_HOME DO_NOT_TRACK CI DISABLE_SAFETENSORS_CONVERSION"),
    ("passed", "trackers: what they are called, where they write, what they send",
     "WANDB_* MLFLOW_* COMET_* TENSORBOARD_* CLEARML_* SWANLAB_* TRACKIO_* KUBEFLOW_* DISABLE_KUBEFLOW_INTEGRATION"
     " DISABLE_MLFLOW_INTEGRATION BRANCH RAY_SCOPE"),
    ("passed", "proxies", "[hH][tT][tT][pP]_* [hH][tT][tT][pP][sS]_* [nN][oO]_[pP][rR]* [aA][lL][lL]_[pP][rR]*"),
    ("passed", "Python and the loader", "PYTHON* LD_LIBRARY_PATH LD_PRELOAD LIBRARY_PATH"),
    ("passed", "compilers of operators", "CC CXX CFLAGS LDFLAGS CPATH CUTLASS_PATH CCL_ROOT USE_MKL_GEMM MAX_JOBS"),
)  # fmt: skip
PATTERNS = [(name, pattern) for name, _, patterns in TABLE for pattern in patterns.split()]


def classify(name: str) -> Class:
    """Return the class of a variable by its name."""
    return next((kind for kind, pattern in PATTERNS if fnmatch.fnmatchcase(name, pattern)), "unrecorded")


def clear_environment(env: MutableMapping[str, str], wanted: Mapping[str, str]) -> dict[str, str]:
    """Remove what the plan holds, in place; returns it, without what the kit sets to the same value (`wanted`)."""
    names = [name for name in sorted(env) if classify(name) == "cleared"]
    removed = {name: env.pop(name) for name in names}
    return {k: HIDDEN if is_secret(k, v) else v for k, v in removed.items() if wanted.get(k) != v}


def clear_ranks(env: MutableMapping[str, str], wanted: Mapping[str, str]) -> dict[str, str]:
    """Remove ranks that a shell has left, in place, where one process is started without a launcher; returns them.

    Those of a batch system stay: the rank refuses to be one of several tasks that train alone.
    """
    left = {k: env[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK") if k in env}
    for name in left:
        del env[name]
    alone = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return {k: v for k, v in left.items() if v != wanted.get(k, alone.get(k, "0"))}


def record_environment(env: Mapping[str, str], cleared: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return what environment.json keeps: values that look like secrets are named alone."""
    passed = {k: v for k, v in sorted(env.items()) if classify(k) == "passed"}
    return {
        "cleared": dict(cleared),
        "numeric_environment": numeric_environment(env),
        "passed": {k: HIDDEN if is_secret(k, v) else v for k, v in passed.items()},
    }


def numeric_environment(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that change numbers: a resumed run needs the same ones."""
    return {k: v for k, v in sorted(env.items()) if classify(k) == "numeric"}


def describe_environment(plan: RunPlan, cleared: Mapping[str, str], numeric: Mapping[str, str]) -> list[str]:
    """Return lines for the console: what was cleared, with what the plan says of it, and what changes numbers."""
    lines = [f"cleared {name}={value[:60]} ({plan_says(name, plan)})" for name, value in cleared.items()]
    lines = [*lines[:8], *([f"cleared {len(lines) - 8} more of this kind"] if len(lines) > 8 else [])]
    return lines + [f"{name}={value[:60]} changes numbers: resume needs the same" for name, value in numeric.items()]


def plan_says(name: str, plan: RunPlan) -> str:
    """Return what the plan has in the place of a cleared variable."""
    trainer, engine = plan.trainer, f"DeepSpeed ZeRO-{plan.zero_stage}" if plan.deepspeed else "no DeepSpeed"
    if name == "ACCELERATE_MIXED_PRECISION" or name.startswith("XLA_"):
        return f"the plan says {plan.precision}"
    if name == "ACCELERATE_GRADIENT_ACCUMULATION_STEPS":
        return f"the plan says {trainer.get('gradient_accumulation_steps', 1)}"
    if name == "ACCELERATE_GRADIENT_CLIPPING":
        return f"the plan says {trainer.get('max_grad_norm', 1.0)}"
    if name in ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE", "DS_ACCELERATOR"):
        return f"the plan says {'CPU' if trainer['use_cpu'] else 'GPU'}"
    if "DEEPSPEED" in name or name.startswith("DS_"):
        return f"the plan says {engine}"
    if "FSDP" in name:
        return f"the plan says {'FSDP, as in plan.fsdp' if plan.fsdp else 'no FSDP'}"
    if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        return f"the plan says {plan.world_size} process{'es' * (plan.world_size > 1)}"
    if name == "TRUST_REMOTE_CODE":
        return f"the plan says {str(plan.model.trust_remote_code).lower()}"
    return "the plan leads"
