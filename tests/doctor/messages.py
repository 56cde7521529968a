"""Errors as torch, NCCL, gloo, DeepSpeed, transformers, datasets and the Hub write them, each with its cause's id.

Where a library is installed here, test_run.py compares the words with its source.
"""

# ruff: noqa: E501  (a log line is as long as it is)

from __future__ import annotations

OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 1.20 GiB is free. Including non-PyTorch memory, this process has 77.80 GiB memory in use. Of the allocated "
    "memory 60.10 GiB is allocated by PyTorch, and {reserved} GiB is reserved by PyTorch but unallocated."
)
MESSAGES = [
    ("cuda_oom", OOM.format(reserved="1.00")),
    ("cuda_oom", "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    (
        "host_memory",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 137438953472 bytes. Error code 12 (Cannot allocate memory)",
    ),
    (
        "shared_memory",
        "RuntimeError: DataLoader worker (pid 4231) is killed by signal: Bus error. It is possible that dataloader's "
        "workers are out of shared memory. Please try to raise your shared memory limit.",
    ),
    (
        "shared_memory",
        "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error, NCCL "
        "version 2.28.9\nLast error:\nError while creating shared memory segment /dev/shm/nccl-ZgZ0pE (size 33030528), "
        "error: No space left on device (28)",
    ),
    ("disk_full", "OSError: [Errno 28] No space left on device: '/scratch/x/model-00001.safetensors'"),
    ("disk_full", "RuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    ("disk_full", "safetensors_rust.SafetensorError: Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
    ("non_finite", "grad_norm is inf at step 12: training stopped, nothing of it is saved"),
    ("loss_scale", "Exception: Current loss scale already at minimum - cannot decrease scale anymore. Exiting run."),
    (
        "port",
        "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. port: "
        "29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use",
    ),
    (
        "rendezvous",
        "torch.distributed.DistNetworkError: The client socket has timed out after 600000ms while trying to connect to "
        "(node1, 29500).",
    ),
    (
        "op_lock",
        "a killed build of cpu_adam left a lock 3600 s ago; every run would wait for it for ever",
    ),
    (
        "cuda_toolkit",
        "deepspeed.ops.op_builder.builder.CUDAMismatchException: >- DeepSpeed Op Builder: Installed CUDA version 12.2 "
        "does not match the version torch was compiled with 13.0, unable to compile cuda/cpp extensions without a "
        "matching cuda version.",
    ),
    (
        "cuda_toolkit",
        "deepspeed.ops.op_builder.builder.MissingCUDAException: CUDA_HOME does not exist, unable to compile CUDA op(s)",
    ),
    ("op_build", "RuntimeError: Error building extension 'cpu_adam'"),
    ("op_build", "RuntimeError: Unable to JIT load the async_io op due to it not being compatible due to hardware/software issue. None"),
    ("op_build", "ImportError: /root/.cache/torch_extensions/py311_cu130/cpu_adam/cpu_adam.so: cannot open shared object file: No such file or directory"),
    (
        "driver",
        "RuntimeError: The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver",
    ),
    ("gpu_too_old", "RuntimeError: CUDA error: no kernel image is available for execution on the device"),
    ("device_assert", "RuntimeError: CUDA error: device-side assert triggered"),
    ("device_assert", "IndexError: index out of range in self"),
    ("gpu_fault", "RuntimeError: CUDA error: an illegal memory access was encountered"),
    ("gpu_fault", "RuntimeError: CUDA error: uncorrectable ECC error encountered"),
    (
        "nccl",
        "torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "
        "unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9\nncclUnhandledCudaError: Call "
        "to CUDA function failed.",
    ),
    ("lora_dtype", "TypeError: output tensor must have the same type as input tensor"),
    (
        "recompute",
        "torch.utils.checkpoint.CheckpointError: torch.utils.checkpoint: Recomputed values for the following tensors have "
        "different metadata than during the forward pass.\ntensor at position 3:\nsaved metadata: {'shape': torch.Size([0])}",
    ),
    ("no_grad", "RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn"),
    (
        "batch_arithmetic",
        "AssertionError: Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * "
        "gradient_acc_step * world_size 16 != 8 * 1 * 1",
    ),
    (
        "world_changed",
        "deepspeed.runtime.zero.utils.ZeRORuntimeException: The checkpoint being loaded used a DP world size of 4 but the "
        "current world size is 2. Automatic adjustment of ZeRO's optimizer state partitioning with a new world size is "
        "not currently supported.",
    ),
    ("world_changed", "the plan is for 2 processes, 1 was started"),
    ("checkpoint", "ValueError: Can't find a valid checkpoint at /runs/x/checkpoints/checkpoint-20"),
    (
        "checkpoint",
        "RuntimeError: Error(s) in loading state_dict for PeftModel:\n\tsize mismatch for base_model.model.q_proj.lora_A: "
        "copying a param with shape torch.Size([8, 32]) from checkpoint, the shape in current model is torch.Size([4, 32]).",
    ),
    ("weights_file", "safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata, file not fully covered"),
    (
        "gated",
        "huggingface_hub.errors.GatedRepoError: 401 Client Error. Cannot access gated repo for url "
        "https://huggingface.co/meta-llama/Llama-2-7b-hf/resolve/main/config.json.",
    ),
    (
        "hub_offline",
        "huggingface_hub.errors.OfflineModeIsEnabled: Cannot reach https://huggingface.co/x: offline mode is enabled. To "
        "disable it, please unset the `HF_HUB_OFFLINE` environment variable.",
    ),
    (
        "hub_offline",
        "OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files.",
    ),
    (
        "network",
        "requests.exceptions.ConnectionError: HTTPSConnectionPool(host='huggingface.co', port=443): Max retries exceeded "
        "with url: /api/models/x",
    ),
    ("missing_package", "ModuleNotFoundError: No module named 'flash_attn'"),
    (
        "missing_package",
        "ImportError: This modeling file requires the following packages that were not found in your environment: einops. "
        "Run `pip install einops`",
    ),
    ("import", "ImportError: cannot import name 'is_torch_fx_available' from 'transformers.utils'"),
    ("open_files", "OSError: [Errno 24] Too many open files: '/data/x.arrow'"),
    ("permission", "PermissionError: [Errno 13] Permission denied: '/scratch/other/cache'"),
    ("data", "datasets.exceptions.DatasetGenerationError: An error occurred while generating the dataset"),
    ("data", "jinja2.exceptions.TemplateError: Conversation roles must alternate user/assistant/user/assistant/..."),
    ("data", "none of the first 8 rows has a token in the loss"),
    ("not_implemented_dtype", "RuntimeError: \"addmm_impl_cpu_\" not implemented for 'Half'"),
]  # fmt: skip

FRAME = '  File "/venv/lib/python3.11/site-packages/{file}", line 1, in {name}\n    {code}\n'


def trace(error: str, *frames: tuple[str, str, str]) -> str:
    """A traceback as Python writes it, of (file, function, source) frames."""
    return "Traceback (most recent call last):\n" + "".join(
        FRAME.format(file=file, name=name, code=code) for file, name, code in frames
    ) + error + "\n"  # fmt: skip


RUN = ("kit/training/run.py", "train", "result = trainer.train(resume_from_checkpoint=checkpoint)")
STEP = ("transformers/trainer.py", "training_step", "loss = self.compute_loss(model, inputs)")
STAGES = {
    "loading the model": [
        ("kit/training/run.py", "train", "model = load_model(plan, tokenizer)"),
        ("transformers/modeling_utils.py", "from_pretrained", "model = cls(config)"),
        ("deepspeed/runtime/zero/partition_parameters.py", "wrapper", "f(module, *args, **kwargs)"),
    ],
    "deepspeed.initialize": [
        RUN,
        ("accelerate/accelerator.py", "_prepare_deepspeed", "engine, *_ = ds_initialize(**kwargs)"),
        ("deepspeed/runtime/engine.py", "_configure_zero_optimizer", "optimizer = DeepSpeedZeroOptimizer("),
    ],
    "the forward pass": [
        RUN, STEP,
        ("torch/nn/modules/module.py", "_call_impl", "return forward_call(*args, **kwargs)"),
        ("transformers/models/llama/modeling_llama.py", "forward", "down = self.down_proj(x)"),
    ],
    "the backward pass": [
        RUN, ("transformers/trainer.py", "training_step", "self.accelerator.backward(loss, **kwargs)"),
        ("torch/autograd/graph.py", "_engine_run_backward", "return Variable._execution_engine.run_backward("),
        ("torch/utils/checkpoint.py", "recompute_fn", "fn(*args, **kwargs)"),
        ("transformers/models/llama/modeling_llama.py", "forward", "down = self.down_proj(x)"),
    ],
    "the optimizer step": [
        RUN, ("deepspeed/runtime/engine.py", "_take_model_step", "self.optimizer.step()"),
        ("torch/optim/adamw.py", "step", "state['exp_avg_sq'] = torch.zeros_like(p)"),
    ],
    "evaluation": [
        RUN, ("transformers/trainer.py", "evaluation_loop", "losses, logits, labels = self.prediction_step("),
        ("transformers/models/llama/modeling_llama.py", "forward", "logits = self.lm_head(h)"),
    ],
    "saving": [
        RUN, ("kit/training/trainer.py", "_save_checkpoint", "self.save_model(str(staging))"),
        ("kit/training/checkpoint.py", "full_state_dict", "tensors[name] = gather(p)"),
    ],
}  # fmt: skip
WATCHDOG = (
    "[rank{rank}]:[E321 02:07:08.408271257 ProcessGroupNCCL.cpp:683] [Rank {rank}] Watchdog caught collective operation "
    "timeout: WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, NumelIn=466119168, NumelOut=466119168, Timeout(ms)=600000) ran for "
    "600060 milliseconds before timing out.\n"
    "[rank{rank}]:[E321 02:07:08.465150152 ProcessGroupNCCL.cpp:2241] [PG ID 0 PG GUID 0(default_pg) Rank {rank}] Exception "
    "(either an error or timeout) detected by watchdog at work: 1580, last enqueued NCCL work: {enqueued}, last completed "
    "NCCL work: 1579.\n"
)
PEER = (
    "RuntimeError: [/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:12694: "
    "Connection reset by peer. This is typically caused by a remote worker hanging or bugs in the application."
)
GLOO = "RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete"
