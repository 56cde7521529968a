"""The rules of machine and launcher: devices, precisions, processes, engines, and activation checkpointing.

kit/config/rules/table.py lists them.
"""

from __future__ import annotations

from kit.config import slurm
from kit.config.rules.context import RuleContext, Violations
from kit.schema.checkpointing import checkpointing_kwargs, is_checkpointed
from kit.schema.dotted import value_at
from kit.system import hardware


def fsdp_and_deepspeed(run: RuleContext) -> Violations:
    if run.plan["fsdp"] and run.plan["deepspeed"]:
        yield "deepspeed and fsdp are both chosen; they shard the same weights", "fsdp", "fsdp=none or deepspeed=none"


def fsdp_on_cpu(run: RuleContext) -> Violations:
    if run.plan["fsdp"] and run.surely_on_cpu:
        yield (
            "accelerate applies FSDP on GPUs only: on a CPU it is silently left out",
            "fsdp",
            "fsdp=none deepspeed=zero3",
        )


def fsdp_alone(run: RuleContext) -> Violations:
    counted = bool(run.gpus) or run.report.chosen(
        "launch.num_gpus"
    )  # where neither is so, another machine will count its GPUs
    if run.plan["fsdp"] and not run.on_cpu and run.world_size == 1 and counted:
        yield "FSDP needs several processes: the trainer refuses it in one", "fsdp", "launch.num_gpus=2, or fsdp=none"


def fsdp_checkpointing(run: RuleContext) -> Violations:
    t = run.plan["trainer"]
    if (run.plan["fsdp"] or {}).get("activation_checkpointing") and is_checkpointed(t):
        name = "activation_checkpointing" if t.get("activation_checkpointing") else "gradient_checkpointing"
        yield (
            "FSDP's activation checkpointing and the trainer's are both on",
            "fsdp.activation_checkpointing",
            f"trainer.{name}=false",
        )


def fp16_and_bf16(run: RuleContext) -> Violations:
    if run.plan["trainer"].get("fp16") is True and run.plan["trainer"].get("bf16") is True:
        yield "fp16 and bf16 are both true", "trainer.fp16", "keep one: trainer.fp16=false or trainer.bf16=false"


def full_eval(run: RuleContext) -> Violations:
    if run.plan["trainer"].get("fp16_full_eval") and run.plan["trainer"].get("bf16_full_eval"):
        yield "fp16_full_eval and bf16_full_eval are both true", "trainer.fp16_full_eval", "keep one"


def fp16_on_cpu(run: RuleContext) -> Violations:
    if run.surely_on_cpu and run.precision == "float16":
        yield "fp16 training needs a GPU: CPUs have no float16 gradient scaling", "trainer.fp16", "trainer.fp16=false"


def ddp_backend(run: RuleContext) -> Violations:
    given, key = run.plan["trainer"].get("ddp_backend"), "trainer.ddp_backend"
    if given and run.surely_on_cpu and run.world_size == 1:
        yield f"ddp_backend={given} in one process asks for a group that nobody starts", key, "leave it out"
    elif given and run.surely_on_cpu and given not in ("gloo", "mpi"):
        yield f"{given} does not run on CPUs", key, "trainer.ddp_backend=gloo, or leave it out"


def tf32_on_cpu(run: RuleContext) -> Violations:
    if run.surely_on_cpu and run.plan["trainer"].get("tf32"):
        yield "tf32 is a mode of GPUs: on a CPU the trainer refuses it", "trainer.tf32", "leave it out"


def bf16_lacking(run: RuleContext) -> Violations:
    old = [g for g in run.gpus if g.capability and g.capability < (8, 0)]
    if run.precision == "bfloat16" and not run.on_cpu and old:
        yield f"{old[0].name} has no bfloat16", "trainer.bf16", "trainer.bf16=false trainer.fp16=true"


def bf16_slow_cpu(run: RuleContext) -> Violations:
    if run.on_cpu and run.precision == "bfloat16" and not hardware.cpu_has_bf16_matmul():
        yield (
            "this CPU has no bfloat16 instructions: 25-50 times slower than float32",
            "trainer.bf16",
            "trainer.bf16=false",
        )


def gpus_missing(run: RuleContext) -> Violations:
    wanted = run.plan["launch"]["num_gpus"]
    elsewhere = run.plan["launch"]["hostfile"] and not run.plan["launch"]["no_ssh"]  # their slots say what there is
    if not run.on_cpu and not elsewhere and wanted > len(run.gpus):
        yield (
            f"{wanted} GPU{'s' * (wanted != 1)} asked for, this machine shows {len(run.gpus)}",
            "launch.num_gpus",
            f"launch.num_gpus={len(run.gpus)}" if run.gpus else "run it where the GPUs are, or trainer.use_cpu=true",
        )


def one_process_local(run: RuleContext) -> Violations:
    for key in ("num_gpus", "num_nodes"):
        if run.plan["launch"]["launcher"] == "local" and run.plan["launch"][key] > 1:
            fix = f"launch=deepspeed, launch=torchrun or launch.{key}=1"
            yield "launch=local starts one process", f"launch.{key}", fix


def hostfile_unread(run: RuleContext) -> Violations:
    launcher = run.plan["launch"]["launcher"]
    for key in ("hostfile", "include", "exclude"):
        if run.plan["launch"][key] and launcher != "deepspeed":
            name = "torchrun" if launcher == "torchrun" else "a plain process"
            fix = "launch=deepspeed, or leave it out (CUDA_VISIBLE_DEVICES names GPUs; launch.num_nodes counts nodes)"
            yield f"{name} knows no launch.{key}", f"launch.{key}", fix
        elif run.plan["launch"][key] and run.plan["launch"]["slurm"]:
            fix = "leave it out: launch.num_nodes and launch.slurm.* ask for nodes"
            yield f"launch=slurm, which chooses the nodes itself, and launch.{key}", f"launch.{key}", fix


def node_rank(run: RuleContext) -> Violations:
    launch = run.plan["launch"]
    rank, nodes, key = launch["node_rank"], launch["num_nodes"], "launch.node_rank"
    if rank is None:
        return
    if launch["slurm"]:
        problem = "a number for this node, but a job has one plan for all of its nodes"
        yield problem, key, "leave it out: SLURM tells them"
    elif rank >= nodes:
        yield f"node {rank} of {nodes}: they are numbered from 0 to {nodes - 1}", key, "launch.num_nodes=NODES"
    elif launch["hostfile"] and not launch["no_ssh"]:
        problem = "launch.node_rank, but one command reaches all nodes of the hostfile with ssh"
        yield problem, key, "leave it out, or launch.no_ssh=true where each node is started by itself"


def port_taken(run: RuleContext) -> Violations:
    launch = run.plan["launch"]
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
            problem = f"port {port} cannot be taken: {error.strerror}"
            yield problem, "launch.master_port", "leave it out: a free port is found"


def token_indices_on_cpu(run: RuleContext) -> Violations:
    if run.zero_stage == 3 and run.surely_on_cpu and (run.plan["peft"] or {}).get("trainable_token_indices"):
        yield (
            "PEFT gathers trainable_token_indices under ZeRO-3 on CUDA only",
            "peft.trainable_token_indices",
            "deepspeed=zero2",
        )


def host_memory(run: RuleContext) -> Violations:
    """Without quantization transformers merges all shards in rank 0's memory before ZeRO-3 parts them."""
    if run.zero_stage != 3 or run.plan["quantization"] or run.plan["model"]["random_init"] or not run.base.bytes:
        return
    import psutil

    total = psutil.virtual_memory().total
    if run.base.bytes > total:
        yield (
            f"under ZeRO-3 rank 0 reads the whole checkpoint into host memory: {format_gb(run.base.bytes)} "
            f"of weights, this machine has {format_gb(total)}",
            "deepspeed.zero_optimization.stage",
            "a node with more host memory, or quantization=nf4",
        )


def quantized_gpu_memory(run: RuleContext) -> Violations:
    """A quantized base is not sharded while it loads: each rank holds all of it at first."""
    q = run.plan["quantization"] or {}
    bits = 4 if q.get("load_in_4bit") else 8 if q.get("load_in_8bit") else None
    if not bits or run.on_cpu or not run.gpus or not run.base.numbers:
        return
    least, room = run.base.numbers * bits // 8, min(g.memory_gb for g in run.gpus) * 2**30
    if least > room:
        yield (
            f"every rank loads the whole {bits}-bit base onto its GPU before it is sharded: at least "
            f"{format_gb(least)}, the GPU has {format_gb(room)}",
            "model.name_or_path",
            "GPUs with more memory, or quantization=none deepspeed=zero3_offload",
        )


def format_gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def checkpointing_names(run: RuleContext) -> Violations:
    t = run.plan["trainer"]
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if t.get(old) is not None and t.get(new) is not None and t[old] != t[new]:
            yield f"{old} and {new} disagree; the second one wins", f"trainer.{old}", f"leave trainer.{old} out"


def selective(run: RuleContext) -> Violations:
    t = run.plan["trainer"]
    given = checkpointing_kwargs(t)
    key = "trainer.gradient_checkpointing_kwargs.selective"
    if not given.get("selective"):
        return
    if not is_checkpointed(t):
        yield "selective checkpointing without checkpointing", key, "trainer.gradient_checkpointing=true"
    elif given.get("use_reentrant"):
        yield "selective checkpointing cannot be reentrant", key, "leave use_reentrant out"
    elif run.plan["peft"] and run.zero_stage == 3:
        problem = "an adapter under ZeRO-3 needs reentrant checkpointing, which cannot be selective"
        yield problem, key, "leave it out, or deepspeed=zero2"
    if t.get("use_liger_kernel") and (t.get("liger_kernel_config") or {}).get("rope"):
        problem = "Liger's rotary embedding overwrites what selective checkpointing keeps: gradients would be wrong"
        yield problem, "trainer.liger_kernel_config.rope", "leave it out"


def every_n_layers(run: RuleContext) -> Violations:
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        key = f"{name}.every_n_layers"
        number = value_at(run.plan["trainer"], key)
        if number is not None and (type(number) is not int or number < 1):
            yield f"every_n_layers={number!r} is no number of layers", f"trainer.{key}", "a whole number from 1 on"


def reentrant(run: RuleContext) -> Violations:
    t = run.plan["trainer"]
    if (
        run.plan["peft"]
        and run.zero_stage == 3
        and is_checkpointed(t)
        and checkpointing_kwargs(t).get("use_reentrant") is False
    ):
        yield (
            "an adapter under ZeRO-3 is checkpointed reentrantly: TRL turns use_reentrant=false into true",
            "trainer.gradient_checkpointing_kwargs.use_reentrant",
            "leave it out",
        )


def slurm_values(run: RuleContext) -> Violations:
    yield from slurm.slurm_value_problems(run.plan["launch"]["slurm"] or {})


def slurm_extra(run: RuleContext) -> Violations:
    yield from slurm.slurm_extra_problems(run.plan["launch"]["slurm"] or {})


def slurm_gpus(run: RuleContext) -> Violations:
    given = (run.plan["launch"]["slurm"] or {}).get("gres")
    count = slurm.gpus_of(given)
    if count is not None and not run.on_cpu and count != run.plan["launch"]["num_gpus"]:
        yield (
            f"launch.slurm.gres={given} asks for {count} GPUs per node, launch.num_gpus for "
            f"{run.plan['launch']['num_gpus']}",
            "launch.slurm.gres",
            "give one of them: the other is derived",
        )
