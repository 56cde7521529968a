"""The causes that a rank's own words give away: one table. The first row that fits a text is its cause.

pattern: searched in the error and its traceback, newlines included; its named groups may stand in the sentences.
Order matters: what is special stands before what is general. Texts are those of torch, NCCL, gloo, DeepSpeed,
transformers, datasets and huggingface_hub; tests/doctor/ holds them as they come.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """A row: `id` for scripts, a pattern, the cause in words, what to do."""

    id: str
    pattern: str
    cause: str
    fix: str


# A rank that says these lost another rank: that one holds the cause.
FELL_AFTER = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|ncclRemoteError|remote process exited"
    r"|rank \d+ failed: |Connection was likely closed|failed to recv, got 0 bytes|Peer closed|socket closed by peer"
)
# A rank that says these waited for another rank in vain: that one hangs, or is slow.
WAITED = re.compile(
    r"Watchdog caught collective operation timeout|Timed out waiting \d+ms for (recv|send)|Socket Timeout|"
    r"wait timeout after \d+ms|waitForInput: .*timed out after \d+ms|collective operation timeout|NCCL watchdog|"
    r"(gloo|ProcessGroupGloo).*[Tt]imed? ?out|monitoredBarrier|Application timeout caused pair closure"
)

CAUSES = (
    Cause(
        "cuda_oom",
        r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|CUDNN_STATUS_ALLOC_FAILED"
        r"|CUBLAS_STATUS_ALLOC_FAILED",
        "the GPU's memory is full",
        "",  # oom.py writes it: it depends on where and on the plan
    ),
    Cause(
        "host_memory",
        r"DefaultCPUAllocator: can't allocate memory|^MemoryError|Cannot allocate memory|std::bad_alloc"
        r"|CUDA error: .*pinned|cudaHostAlloc",
        "host memory is full, or memory cannot be locked",
        "fewer ranks or data workers (trainer.dataloader_num_workers=0), pin_memory: false in offload, more memory;"
        " for pinned memory ulimit -l unlimited",
    ),
    Cause(
        "shared_memory",
        r"unable to (allocate|mmap|open) shared memory|DataLoader worker .* killed by signal: Bus error"
        r"|Error while creating shared memory|out of shared memory|No space left on device.*/dev/shm"
        r"|/dev/shm.*No space left on device",
        "/dev/shm is full",
        "docker run --shm-size=16g (or --ipc=host), or trainer.dataloader_num_workers=0",
    ),
    Cause(
        "disk_full",
        # torch.save does not say it: its archive is shorter than what it wrote.
        r"No space left on device|\[Errno 28\]|Disk quota exceeded|\[Errno 122\]|inline_container.* unexpected pos"
        r"|PytorchStreamWriter failed writing|basic_ios::clear: iostream error",
        "the disk, or the quota, is full",
        "free space below the run directory, or set save_total_limit; then kit resume",
    ),
    Cause(
        "non_finite",
        r"(?P<name>loss|grad_norm|train_loss) is (?P<value>-?(?:nan|inf)) at step (?P<step>\d+)",
        "{name} became {value} by step {step}",
        "look at the rows that were read; lower trainer.learning_rate, trainer.max_grad_norm=1.0; float16 overflows"
        " where bfloat16 does not",
    ),
    Cause(
        "loss_scale",
        r"Current loss scale already at minimum",
        "float16 overflows at every step, whatever the loss scale",
        "trainer.bf16=true on GPUs that have it; else a lower trainer.learning_rate; look at the data",
    ),
    Cause(
        "port",
        r"EADDRINUSE|[Aa]ddress already in use|server socket has failed to listen on",
        "the master port is taken by another process",
        "leave launch.master_port out (the kit takes a free one), or one for each job; kit doctor says who listens",
    ),
    Cause(
        "rendezvous",
        r"client socket has timed out after|client socket has failed to connect|Rendezvous\w*Error|DistNetworkError"
        r"|No route to host|Name or service not known",
        "the ranks did not find each other",
        "MASTER_ADDR must be reachable from all nodes and its port open; NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
        " names the network card",
    ),
    Cause(
        "op_lock",
        r"file_baton|FileBaton|Waited on lock file|left a lock .* would wait for it for ever",
        "a killed build of a DeepSpeed operator left its lock, and this run waited for it",
        "kit doctor --remove-stale-locks",
    ),
    Cause(
        "cuda_toolkit",
        r"CUDAMismatchException|does not match the version torch was compiled with|MissingCUDAException"
        r"|CUDA_HOME does not exist|CUDA_HOME environment variable is not set",
        "nvcc is not of the CUDA that torch was built with, or is missing: operators cannot be compiled",
        "install the CUDA toolkit of torch's version and set CUDA_HOME; kit doctor shows both",
    ),
    Cause(
        "op_build",
        r"Error building extension|Unable to JIT load the (?P<op>\w+) op|[Nn]inja is required|does not compile:"
        r"|not being installed\. Ninja|\w+\.so: cannot open shared object file",
        "a DeepSpeed operator does not compile or load",
        "kit doctor (compilers, ninja, libaio), then kit doctor --build-ops",
    ),
    Cause(
        "driver",
        r"NVIDIA driver on your system is too old|CUDA driver version is insufficient"
        r"|forward compatibility was attempted"
        r"|Driver/library version mismatch|no NVIDIA driver on your system|Error 80[34]:",
        "the NVIDIA driver does not serve the CUDA that torch was built with",
        "a newer driver, or a torch wheel for an older CUDA; kit doctor shows both",
    ),
    Cause(
        "gpu_too_old",
        r"no kernel image is available for execution|is not compatible with the current PyTorch installation",
        "the installed torch holds no code for this GPU",
        "a torch wheel that covers the GPU's compute capability; kit doctor shows it",
    ),
    Cause(
        "device_assert",
        r"device-side assert triggered|vectorized_gather_kernel|index out of range in self|indexSelect\w*Index",
        "an index is out of range on the device: mostly a token id beyond the embedding",
        "the tokenizer's size must not exceed the model's vocab_size (kit check says it); on a GPU,"
        " CUDA_LAUNCH_BLOCKING=1 shows the line",
    ),
    Cause(
        "gpu_fault",
        r"uncorrectable ECC|CUDA error: (unspecified launch failure|an illegal memory access|misaligned address)"
        r"|fallen off the bus|\bXid\b|hardware error",
        "the GPU reported a fault",
        "nvidia-smi -q and dmesg tell more; reset or leave out that GPU; if it comes again elsewhere, it is the code",
    ),
    Cause(
        "nccl",
        r"NCCL error|ncclSystemError|ncclUnhandledCudaError|ncclInternalError|ncclInvalidUsage|ncclInvalidArgument",
        "NCCL failed to set up or to exchange",
        "export NCCL_DEBUG=INFO and run again; usual suspects: /dev/shm too small, NCCL_SOCKET_IFNAME, two ranks on"
        " one GPU, left-over NCCL_ variables (kit doctor lists them)",
    ),
    Cause(
        "lora_dtype",
        r"output tensor must have the same type as input tensor",
        "ZeRO-3 gathers parameters of two precisions: the adapter is float32, the base bfloat16 (DeepSpeed#8072)",
        "train through kit.worker, which keeps them equal; in a script of your own"
        " get_peft_model(..., autocast_adapter_dtype=False)",
    ),
    Cause(
        "recompute",
        r"CheckpointError|Recomputed values for the following tensors have different metadata"
        r"|different number of tensors was saved",
        "activation checkpointing recomputed other shapes than it saved: ZeRO-3 and frozen weights (DeepSpeed#8130)",
        "trainer.gradient_checkpointing_kwargs={{use_reentrant: true}}, or trainer.gradient_checkpointing=false",
    ),
    Cause(
        "no_grad",
        r"element 0 of tensors does not require grad",
        "the loss depends on nothing trained: checkpointing without gradients at the input (transformers#42489)",
        "model.enable_input_require_grads(), which kit.worker does; or use_reentrant: false",
    ),
    Cause(
        "batch_arithmetic",
        r"Check batch related parameters.*?(?P<a>\d+) != (?P<b>\d+) \* (?P<c>\d+) \* (?P<d>\d+)",
        "DeepSpeed counts another number of processes or rows than the plan: {a} is not {b} x {c} x {d}",
        "compose again where it runs, and give global_batch_size instead of train_batch_size; on CPU DeepSpeed must"
        " know its ranks before the model loads",
    ),
    Cause(
        "world_changed",
        r"DP world size of|world size of \d+ but the current|was saved by \d+ processes and this run has"
        r"|the plan is for \d+ processes",
        "the checkpoint, or the plan, is for another number of processes: ZeRO cuts its state by it",
        "resume with as many processes as before, or start a new run with peft.init_from=the adapter",
    ),
    Cause(
        "checkpoint",
        r"Can't find a valid checkpoint|is not a complete checkpoint|[Ss]ize mismatch for"
        r"|[Ee]rror\(s\) in loading state_dict|Missing key\(s\) in state_dict|UniversalCheckpoint",
        "the checkpoint does not fit the model, or is incomplete",
        "kit resume takes the newest complete one; another base, rank or target modules make it another run",
    ),
    Cause(
        "weights_file",
        r"SafetensorError|HeaderTooLarge|MetadataIncompleteBuffer|incomplete metadata|PytorchStreamReader failed",
        "a weights file is cut short or damaged",
        "fetch or copy it again; kit fetch checks sizes",
    ),
    Cause(
        "gated",
        r"GatedRepoError|is gated|401 Client Error|403 Client Error|Access to model .* is restricted",
        "the Hub does not let this account read the repository",
        "ask for access on the model's page, then hf auth login or HF_TOKEN; fetch it before: kit fetch",
    ),
    Cause(
        "hub_offline",
        r"OfflineModeIsEnabled|offline mode is enabled|LocalEntryNotFoundError|HF_HUB_OFFLINE is set"
        r"|couldn't connect to 'https?://|outgoing traffic has been disabled",
        "something is not in the Hub cache, and the Hub may not or cannot be asked",
        "where there is a network: kit fetch with the run's own words",
    ),
    Cause(
        "network",
        r"Max retries exceeded|NameResolutionError|Temporary failure in name resolution|ConnectTimeout|ReadTimeout"
        r"|ProxyError|SSLError|Read timed out",
        "the network, or the Hub, did not answer",
        "kit fetch before the run; then export HF_HUB_OFFLINE=1",
    ),
    Cause(
        "missing_package",
        r"(?:ModuleNotFoundError: )?No module named '(?P<module>[\w.]+)'"
        r"|requires the following packages.*?: (?P<need>[\w, -]+)"
        r"|ImportError: .*?(?:pip install [\"'`]?(?P<pip>[\w\[\]-]+))",
        "a package is missing: {module}{need}{pip}",
        "pip install {module}{need}{pip}; kit doctor compares the installed packages with the tested ones",
    ),
    Cause(
        "import",
        r"ImportError|undefined symbol|GLIBC\w*_[\d.]+' not found|cannot import name",
        "installed packages do not fit each other",
        "kit doctor compares them with the tested ones; a fresh .venv is the short way",
    ),
    Cause(
        "open_files",
        r"Too many open files|\[Errno 24\]",
        "the limit of open files is reached",
        "ulimit -n 65535",
    ),
    Cause(
        "permission",
        r"Permission denied|Read-only file system|\[Errno 13\]|\[Errno 30\]",
        "a file or folder may not be written or read",
        "runs_dir=FOLDER of your own; HF_HOME, TMPDIR",
    ),
    Cause(
        "data",
        r"DatasetGenerationError|JSONDecodeError|ArrowInvalid|JSON parse error|CastError|UnicodeDecodeError"
        r"|DataFilesNotFoundError|EmptyDatasetError|KeyError: '(?:messages|text|prompt|completion)'"
        r"|has a token in the loss|jinja2.exceptions|Conversation roles must alternate",
        "the data, or the chat template over them, do not read",
        "the message names the row or the column; kit check RECIPE reads the first rows again",
    ),
    Cause(
        "not_implemented_dtype",
        r"not implemented for '(?P<dtype>\w+)'|expected (?:m1 and m2|scalar type|mat1 and mat2).*dtype"
        r"|Expected all tensors to be on the same device",
        "an operation met a precision or a device that it does not know",
        "trainer.bf16 and model.dtype must agree; on a CPU use float32",
    ),
    Cause(
        "illegal_instruction",
        r"Illegal instruction|SIGILL",
        "code compiled for another CPU ran here: operators of a shared home",
        "unset TORCH_EXTENSIONS_DIR, or one folder per kind of machine; then kit doctor --build-ops",
    ),
    Cause(
        "crash",
        r"Segmentation fault|SIGSEGV|Fatal Python error|SIGABRT|SIGBUS|Bus error",
        "native code crashed",
        "PYTHONFAULTHANDLER=1 shows where; kit doctor compares the packages with the tested ones",
    ),
)


def find_cause(text: str) -> tuple[Cause, dict[str, str]] | None:
    """The first cause whose pattern is in `text`, with the groups that it named."""
    for cause in CAUSES:
        if match := re.search(cause.pattern, text, re.S | re.M):
            return cause, {key: value or "" for key, value in match.groupdict().items()}
    return None
