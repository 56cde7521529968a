"""An accelerate config (default_config.yaml), `accelerate launch`, and the other launchers' options.

Upstream: accelerate commands/config/config_args.py and cluster.py (1.15).
"""

from __future__ import annotations

import re
from typing import Any

from kit.errors import KitError
from kit.foreign import sharding
from kit.foreign.report import Reading

SEVERAL_MACHINES = "several machines are started by a batch system"
NOTHING_NEEDED = {
    "debug": "accelerate's own collectives check",
    "rdzv_backend": "the launcher's own",
    "same_network": "the launcher's own",
    "main_training_function": "kit.worker starts every rank",
    "tpu_env": "no TPU here",
    "tpu_use_cluster": "no TPU here",
    "tpu_use_sudo": "no TPU here",
    "tpu_name": "no TPU here",
    "tpu_zone": "no TPU here",
    "num_cpu_threads_per_process": "the launcher's own",
}
NO_COUNTERPART = {
    "enable_cpu_affinity": ("the launcher's own", "numactl, or the deepspeed launcher's --bind_cores_to_rank"),
    "main_process_ip": (
        SEVERAL_MACHINES,
        "launch the plan with deepspeed or torchrun on each: --module kit.worker PLAN.json",
    ),
    "machine_rank": (SEVERAL_MACHINES, "the same"),
    "fp8_config": ("no fp8 training here", "trainer.bf16=true"),
    "parallelism_config": ("not known by these names", "trainer.parallelism_config.KEY=..."),
    "megatron_lm_config": ("no Megatron here", "deepspeed=zero3"),
    "mpirun_config": ("no MPI launcher here", "launch=torchrun"),
    "command_file": ("the kit starts its own worker", "launch.script=my_train.py"),
    "commands": ("the kit starts its own worker", ""),
    "tpu_vm": ("no TPU here", ""),
    "ipex_config": ("no IPEX here", ""),
}
DEEPSPEED_NO_COUNTERPART = {
    "deepspeed_hostfile": (SEVERAL_MACHINES, "the deepspeed launcher's --hostfile"),
    "deepspeed_exclusion_filter": ("devices are chosen outside", "CUDA_VISIBLE_DEVICES=..."),
    "deepspeed_inclusion_filter": ("devices are chosen outside", "CUDA_VISIBLE_DEVICES=..."),
    "deepspeed_moe_layer_cls_names": (
        "not an accelerate matter here",
        "deepspeed.zero_optimization.leaf_module.classes",
    ),
    "enable_msamp": ("no MS-AMP here", ""),
    "msamp_opt_level": ("no MS-AMP here", ""),
}
PRECISION = {"bf16": (True, False), "fp16": (False, True), "no": (False, False)}


def import_accelerate(r: Reading) -> None:
    where = r.get("compute_environment", default="LOCAL_MACHINE")
    if where not in ("LOCAL_MACHINE", 0, "0", None):
        raise KitError(
            f"{where} is no machine that the kit starts on", f"{r.name}: compute_environment", "LOCAL_MACHINE"
        )
    if r.has("compute_environment"):
        r.mark_default(("compute_environment",), "the kit starts on the machine where it stands")
    kind = str(r.get("distributed_type", default="NO")).upper()
    if kind in ("MEGATRON_LM", "XLA", "TPU"):
        raise KitError(f"the kit has no {kind}", f"{r.name}: distributed_type", "MULTI_GPU, DEEPSPEED or FSDP")
    import_processes(r, kind)
    import_precision(r)
    r.mark_defaults(NOTHING_NEEDED)
    r.leave_all(NO_COUNTERPART)
    if r.has("use_cpu"):
        if r.get("use_cpu") in (True, "true"):
            r.carry(("use_cpu",), "trainer.use_cpu", True)
        else:
            r.mark_default(("use_cpu",), "the GPUs that are there are used")
    if r.has("gpu_ids") and not r.skip_null("gpu_ids"):
        if r.get("gpu_ids") == "all":
            r.mark_default(("gpu_ids",), "all that are there")
        else:
            r.leave(("gpu_ids",), "devices are chosen outside", f"export CUDA_VISIBLE_DEVICES={r.get('gpu_ids')}")
    if r.has("main_process_port") and not r.skip_null("main_process_port"):
        r.carry(("main_process_port",), "launch.master_port", r.get("main_process_port"))
    if r.has("downcast_bf16"):
        if r.get("downcast_bf16") in ("no", False, None):
            r.mark_default(("downcast_bf16",), "off, as here")
        else:
            r.leave(("downcast_bf16",), "for TPUs", "")
    import_compile(r)
    import_deepspeed(r, kind)
    if isinstance(r.get("fsdp_config"), dict) and r.get("fsdp_config"):
        if kind == "FSDP":
            sharding.import_fsdp_config(r, "fsdp_config")
        else:
            r.mark_default(("fsdp_config",), f"not read: distributed_type is {kind}")
    elif r.has("fsdp_config"):
        r.mark_default(("fsdp_config",), "empty")
    elif kind == "FSDP":
        r.recipe.default("fsdp.version", 1, "accelerate's default")


def import_processes(r: Reading, kind: str) -> None:
    machines = r.get("num_machines", default=1) or 1
    count = r.get("num_processes")
    if r.has("distributed_type"):
        r.mark_default(("distributed_type",), "the blocks below and the number of processes say it")
    if r.has("num_machines"):
        if machines == 1:
            r.mark_default(("num_machines",), "one machine, as here")
        else:
            r.leave(("num_machines",), SEVERAL_MACHINES, "launch the plan with deepspeed or torchrun on each machine")
    if r.has("num_processes") and not r.skip_null("num_processes"):
        whole = isinstance(count, int) and isinstance(machines, int) and machines > 1 and count % machines == 0
        note = f"{count} over {machines} machines, counted on one" if whole else ""
        each = count // machines if whole and isinstance(count, int) else count
        r.carry(("num_processes",), "launch.num_gpus", "auto" if each == -1 else each, note)
    elif kind == "NO":
        r.recipe.default("launch.num_gpus", 1, "accelerate starts one process")


def import_precision(r: Reading) -> None:
    if not r.has("mixed_precision") or r.skip_null("mixed_precision"):
        return
    word = "no" if r.get("mixed_precision") is False else str(r.get("mixed_precision")).lower()
    if word not in PRECISION:
        r.leave(("mixed_precision",), f"no {word} training here", "trainer.bf16=true")
        return
    for name, value in zip(("bf16", "fp16"), PRECISION[word], strict=True):
        r.carry(("mixed_precision",), f"trainer.{name}", value)


def import_compile(r: Reading) -> None:
    block = r.get("dynamo_config")
    if r.has("dynamo_backend"):
        if str(r.get("dynamo_backend")).lower() in ("no", "false", "none"):
            r.mark_default(("dynamo_backend",), "not compiled, as here")
        else:
            r.carry(("dynamo_backend",), "trainer.torch_compile", True)
            r.carry(("dynamo_backend",), "trainer.torch_compile_backend", str(r.get("dynamo_backend")).lower())
    if not isinstance(block, dict) or not block:
        if r.has("dynamo_config"):
            r.mark_default(("dynamo_config",), "empty")
        return
    for name in list(block):
        if not r.has("dynamo_config", name) or r.skip_null("dynamo_config", name):
            continue
        path, value = ("dynamo_config", name), str(block[name]).lower()
        if name == "dynamo_backend" and value not in ("no", "false"):
            r.carry(path, "trainer.torch_compile", True)
            r.carry(path, "trainer.torch_compile_backend", value)
        elif name == "dynamo_backend":
            r.mark_default(path, "not compiled, as here")
        elif name == "dynamo_mode" and value != "default":
            r.carry(path, "trainer.torch_compile_mode", value)
        elif value in ("false", "no", "default"):
            r.mark_default(path, "off, as here")
        else:
            r.leave(path, "transformers passes no such setting on", "")


def import_deepspeed(r: Reading, kind: str) -> None:
    """A JSON that is named is followed; else the flags make the JSON that accelerate makes of them."""
    block = r.get("deepspeed_config")
    block_key = "deepspeed_config"
    if not isinstance(block, dict) or not block:
        if r.has(block_key):
            r.mark_default((block_key,), "empty")
        return
    if kind != "DEEPSPEED" and "distributed_type" in r.tree:
        r.mark_default((block_key,), f"not read: distributed_type is {kind}")
        return
    r.leave_all(DEEPSPEED_NO_COUNTERPART, block_key)
    r.mark_defaults({"deepspeed_multinode_launcher": "one machine needs none",
             "zero3_init_flag": "the kit loads under zero.Init wherever stage 3 asks for it"}, block_key)  # fmt: skip
    if block.get("deepspeed_config_file"):
        sharding.import_deepspeed_file(r, block_key, "deepspeed_config_file")
        for name in list(block):
            if r.has(block_key, name):
                r.leave((block_key, name), "the file stands: accelerate refuses both", "put it into the JSON")
        return
    r.skip_null(block_key, "deepspeed_config_file")
    zero = "deepspeed.zero_optimization."
    stage = block.get("zero_stage", 2)
    if r.has(block_key, "gradient_accumulation_steps") and not r.skip_null(block_key, "gradient_accumulation_steps"):
        steps = block["gradient_accumulation_steps"]
        path = (block_key, "gradient_accumulation_steps")
        if steps == "auto":
            r.mark_default(path, "the trainer's own")
        else:
            r.carry(path, "trainer.gradient_accumulation_steps", steps)
    if r.has(block_key, "gradient_clipping") and not r.skip_null(block_key, "gradient_clipping"):
        clip = block["gradient_clipping"]
        if clip == "auto":
            r.mark_default((block_key, "gradient_clipping"), "the trainer's own")
        else:
            r.carry((block_key, "gradient_clipping"), "trainer.max_grad_norm", clip)
    if r.has(block_key, "zero_stage") and not r.skip_null(block_key, "zero_stage"):
        r.carry((block_key, "zero_stage"), zero + "stage", stage)
    else:
        r.recipe.default(zero + "stage", 2, "accelerate's default")
    for part in ("optimizer", "param"):
        name = f"offload_{part}_device"
        if r.has(block_key, name):
            if block[name] in ("none", None, False):
                r.mark_default((block_key, name), "not offloaded, as here")
            elif part == "param" and stage != 3:
                r.mark_default((block_key, name), f"not read: stage {stage} does not offload parameters")
            else:
                r.carry((block_key, name), f"{zero}offload_{part}.device", block[name])
        name = f"offload_{part}_nvme_path"
        if r.has(block_key, name) and not r.skip_null(block_key, name):
            if block.get(f"offload_{part}_device") == "nvme":
                r.carry((block_key, name), f"{zero}offload_{part}.nvme_path", block[name])
            else:
                r.mark_default((block_key, name), "not read: nothing goes to NVMe")
    name = "zero3_save_16bit_model"
    if r.has(block_key, name) and not r.skip_null(block_key, name):
        if stage == 3:
            r.carry(
                (block_key, name), zero + "stage3_gather_16bit_weights_on_model_save", block[name] in (True, "true", 1)
            )
        else:
            r.mark_default((block_key, name), f"not read at stage {stage}")
    # What accelerate writes into the JSON that it makes of these flags.
    for name in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16.enabled",
        "fp16.enabled",
    ):
        r.recipe.values.setdefault(f"deepspeed.{name}", "auto")


def import_launcher(r: Reading) -> None:
    """torchrun's and deepspeed's own options."""
    if r.name in ("deepspeed", "torchrun"):
        r.recipe.groups["launch"] = r.name
    for name in ("num_gpus", "nproc_per_node"):
        if r.has(name):
            count: Any = r.get(name)
            r.carry((name,), "launch.num_gpus", count if isinstance(count, int) and count > 0 else "auto")
    if r.has("master_port"):
        r.carry(("master_port",), "launch.master_port", r.get("master_port"))
    for name in ("nnodes", "num_nodes"):
        if r.has(name) and str(r.get(name)) == "1":
            r.mark_default((name,), "one machine, as here")
    fix = "start the plan with the launcher itself: --module kit.worker PLAN.json"
    for name in list(r.tree):
        if r.has(name):
            r.leave((name,), "an option of the launcher that the kit does not set", fix)


def import_environment(r: Reading) -> None:
    for name in list(r.tree):
        if r.has(name):
            secret = re.search(r"(KEY|TOKEN|SECRET|PASSWORD)$", str(name))
            r.leave((name,), "the environment is yours", f"export {name}={'...' if secret else r.get(name)}")
