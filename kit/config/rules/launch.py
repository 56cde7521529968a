"""The rules of machine and launcher: devices, precisions, processes, engines, and activation checkpointing.

kit/config/rules/table.py lists them in its table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kit.config import slurm
from kit.system import hardware

if TYPE_CHECKING:
    from kit.config.rules.table import Facts

Found = Iterator[tuple[str, str, str]]


def fsdp_and_deepspeed(f: Facts) -> Found:
    if f.plan["fsdp"] and f.plan["deepspeed"]:
        yield "deepspeed and fsdp are both chosen; they shard the same weights", "fsdp", "fsdp=none or deepspeed=none"


def fsdp_on_cpu(f: Facts) -> Found:
    if f.plan["fsdp"] and f.surely_on_cpu:
        yield (
            "accelerate applies FSDP on GPUs only: on a CPU it is silently left out",
            "fsdp",
            "fsdp=none deepspeed=zero3",
        )


def fsdp_alone(f: Facts) -> Found:
    counted = bool(f.gpus) or f.chosen("launch.num_gpus")  # where neither is so, another machine will count its GPUs
    if f.plan["fsdp"] and not f.on_cpu and f.world_size == 1 and counted:
        yield "FSDP needs several processes: the trainer refuses it in one", "fsdp", "launch.num_gpus=2, or fsdp=none"


def fsdp_checkpointing(f: Facts) -> Found:
    t = f.plan["trainer"]
    if (f.plan["fsdp"] or {}).get("activation_checkpointing") and checkpointing(f):
        name = "activation_checkpointing" if t.get("activation_checkpointing") else "gradient_checkpointing"
        yield (
            "FSDP's activation checkpointing and the trainer's are both on",
            "fsdp.activation_checkpointing",
            f"trainer.{name}=false",
        )


def checkpointing(f: Facts) -> bool:
    """Whether activations are recomputed; the new name goes before the old one, whose default TRL makes true."""
    t = f.plan["trainer"]
    new, old = t.get("activation_checkpointing"), t.get("gradient_checkpointing", True)
    return bool(old if new is None else new)


def fp16_and_bf16(f: Facts) -> Found:
    if f.plan["trainer"].get("fp16") is True and f.plan["trainer"].get("bf16") is True:
        yield "fp16 and bf16 are both true", "trainer.fp16", "keep one: trainer.fp16=false or trainer.bf16=false"


def full_eval(f: Facts) -> Found:
    if f.plan["trainer"].get("fp16_full_eval") and f.plan["trainer"].get("bf16_full_eval"):
        yield "fp16_full_eval and bf16_full_eval are both true", "trainer.fp16_full_eval", "keep one"


def fp16_on_cpu(f: Facts) -> Found:
    if f.surely_on_cpu and f.precision == "float16":
        yield "fp16 training needs a GPU: CPUs have no float16 gradient scaling", "trainer.fp16", "trainer.fp16=false"


def ddp_backend(f: Facts) -> Found:
    given, key = f.plan["trainer"].get("ddp_backend"), "trainer.ddp_backend"
    if given and f.surely_on_cpu and f.world_size == 1:
        yield f"ddp_backend={given} in one process asks for a group that nobody starts", key, "leave it out"
    elif given and f.surely_on_cpu and given not in ("gloo", "mpi"):
        yield f"{given} does not run on CPUs", key, "trainer.ddp_backend=gloo, or leave it out"


def tf32_on_cpu(f: Facts) -> Found:
    if f.surely_on_cpu and f.plan["trainer"].get("tf32"):
        yield "tf32 is a mode of GPUs: on a CPU the trainer refuses it", "trainer.tf32", "leave it out"


def bf16_lacking(f: Facts) -> Found:
    old = [g for g in f.gpus if g.capability and g.capability < (8, 0)]
    if f.precision == "bfloat16" and not f.on_cpu and old:
        yield f"{old[0].name} has no bfloat16", "trainer.bf16", "trainer.bf16=false trainer.fp16=true"


def bf16_slow_cpu(f: Facts) -> Found:
    if f.on_cpu and f.precision == "bfloat16" and not hardware.cpu_multiplies_bf16():
        yield (
            "this CPU has no bfloat16 instructions: 25-50 times slower than float32",
            "trainer.bf16",
            "trainer.bf16=false",
        )


def gpus_missing(f: Facts) -> Found:
    wanted = f.plan["launch"]["num_gpus"]
    elsewhere = f.plan["launch"]["hostfile"] and not f.plan["launch"]["no_ssh"]  # their slots say what there is
    if not f.on_cpu and not elsewhere and wanted > len(f.gpus):
        yield (
            f"{wanted} GPU{'s' * (wanted != 1)} asked for, this machine shows {len(f.gpus)}",
            "launch.num_gpus",
            f"launch.num_gpus={len(f.gpus)}" if f.gpus else "run it where the GPUs are, or trainer.use_cpu=true",
        )


def one_process_local(f: Facts) -> Found:
    for key in ("num_gpus", "num_nodes"):
        if f.plan["launch"]["launcher"] == "local" and f.plan["launch"][key] > 1:
            fix = f"launch=deepspeed, launch=torchrun or launch.{key}=1"
            yield "launch=local starts one process", f"launch.{key}", fix


def hostfile_unread(f: Facts) -> Found:
    launcher = f.plan["launch"]["launcher"]
    for key in ("hostfile", "include", "exclude"):
        if f.plan["launch"][key] and launcher != "deepspeed":
            name = "torchrun" if launcher == "torchrun" else "a plain process"
            fix = "launch=deepspeed, or leave it out (CUDA_VISIBLE_DEVICES names GPUs; launch.num_nodes counts nodes)"
            yield f"{name} knows no launch.{key}", f"launch.{key}", fix
        elif f.plan["launch"][key] and f.plan["launch"]["slurm"]:
            fix = "leave it out: launch.num_nodes and launch.slurm.* ask for nodes"
            yield f"launch=slurm, which chooses the nodes itself, and launch.{key}", f"launch.{key}", fix


def node_rank(f: Facts) -> Found:
    launch = f.plan["launch"]
    rank, nodes, key = launch["node_rank"], launch["num_nodes"], "launch.node_rank"
    if rank is None:
        return
    if launch["slurm"]:
        said = "a number for this node, but a job has one plan for all of its nodes"
        yield said, key, "leave it out: SLURM tells them"
    elif rank >= nodes:
        yield f"node {rank} of {nodes}: they are numbered from 0 to {nodes - 1}", key, "launch.num_nodes=NODES"
    elif launch["hostfile"] and not launch["no_ssh"]:
        said = "launch.node_rank, but one command reaches all nodes of the hostfile with ssh"
        yield said, key, "leave it out, or launch.no_ssh=true where each node is started by itself"


def port_taken(f: Facts) -> Found:
    launch = f.plan["launch"]
    port = launch["master_port"]
    elsewhere = (launch["hostfile"] and not launch["no_ssh"]) or launch["node_rank"]  # node 0 will listen, not this
    if not port or launch["launcher"] == "local" or elsewhere:
        return
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left is free
        try:
            probe.bind(("", port))
        except OSError as error:
            said = f"port {port} cannot be taken: {error.strerror}"
            yield said, "launch.master_port", "leave it out: a free port is found"


def token_indices_on_cpu(f: Facts) -> Found:
    if f.stage == 3 and f.surely_on_cpu and (f.plan["peft"] or {}).get("trainable_token_indices"):
        yield (
            "PEFT gathers trainable_token_indices under ZeRO-3 on CUDA only",
            "peft.trainable_token_indices",
            "deepspeed=zero2",
        )


def host_memory(f: Facts) -> Found:
    """Without quantization transformers merges all shards in rank 0's memory before ZeRO-3 parts them."""
    if f.stage != 3 or f.plan["quantization"] or f.plan["model"]["random_init"] or not f.base_bytes:
        return
    import psutil

    total = psutil.virtual_memory().total
    if f.base_bytes > total:
        yield (
            f"under ZeRO-3 rank 0 reads the whole checkpoint into host memory: {gb(f.base_bytes)} of weights, "
            f"this machine has {gb(total)}",
            "deepspeed.zero_optimization.stage",
            "a node with more host memory, or quantization=nf4",
        )


def quantized_gpu_memory(f: Facts) -> Found:
    """A quantized base is not sharded while it loads: each rank holds all of it at first."""
    q = f.plan["quantization"] or {}
    bits = 4 if q.get("load_in_4bit") else 8 if q.get("load_in_8bit") else None
    if not bits or f.on_cpu or not f.gpus or not f.base_numbers:
        return
    least, room = f.base_numbers * bits // 8, min(g.memory_gb for g in f.gpus) * 2**30
    if least > room:
        yield (
            f"every rank loads the whole {bits}-bit base onto its GPU before it is sharded: at least {gb(least)}, "
            f"the GPU has {gb(room)}",
            "model.name_or_path",
            "GPUs with more memory, or quantization=none deepspeed=zero3_offload",
        )


def gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def checkpointing_names(f: Facts) -> Found:
    t = f.plan["trainer"]
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if t.get(old) is not None and t.get(new) is not None and t[old] != t[new]:
            yield f"{old} and {new} disagree; the second one wins", f"trainer.{old}", f"leave trainer.{old} out"


def selective(f: Facts) -> Found:
    given = options(f)
    key = "trainer.gradient_checkpointing_kwargs.selective"
    if not given.get("selective"):
        return
    if not checkpointing(f):
        yield "selective checkpointing without checkpointing", key, "trainer.gradient_checkpointing=true"
    elif given.get("use_reentrant"):
        yield "selective checkpointing cannot be reentrant", key, "leave use_reentrant out"
    elif f.plan["peft"] and f.stage == 3:
        said = "an adapter under ZeRO-3 needs reentrant checkpointing, which cannot be selective"
        yield said, key, "leave it out, or deepspeed=zero2"


def reentrant(f: Facts) -> Found:
    if f.plan["peft"] and f.stage == 3 and checkpointing(f) and options(f).get("use_reentrant") is False:
        yield (
            "an adapter under ZeRO-3 is checkpointed reentrantly: TRL turns use_reentrant=false into true",
            "trainer.gradient_checkpointing_kwargs.use_reentrant",
            "leave it out",
        )


def options(f: Facts) -> dict[str, Any]:
    t = f.plan["trainer"]
    given = t.get("activation_checkpointing_kwargs") or t.get("gradient_checkpointing_kwargs")
    return given if isinstance(given, dict) else {}


def slurm_values(f: Facts) -> Found:
    yield from slurm.value_problems(f.plan["launch"]["slurm"] or {})


def slurm_extra(f: Facts) -> Found:
    yield from slurm.extra_problems(f.plan["launch"]["slurm"] or {})


def slurm_gpus(f: Facts) -> Found:
    given = (f.plan["launch"]["slurm"] or {}).get("gres")
    count = slurm.gpus_of(given)
    if count is not None and not f.on_cpu and count != f.plan["launch"]["num_gpus"]:
        yield (
            f"launch.slurm.gres={given} asks for {count} GPUs per node, launch.num_gpus for "
            f"{f.plan['launch']['num_gpus']}",
            "launch.slurm.gres",
            "give one of them: the other is derived",
        )
