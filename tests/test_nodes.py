"""Several nodes without starting any: hostfiles, argv, who a node is, what reaches it, who is ended."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kit import api, worker
from kit.cli import verbs as cli
from kit.errors import REFUSED, STOPPED, KitError
from kit.launchers import command, node, ranks, ssh, supervise
from kit.storage import run_directory
from kit.storage.json_files import atomic_write_json
from kit.system.secrets import is_secret

CPU = ("trainer.use_cpu=true", "trainer.bf16=false")
HOSTS = "a slots=4\n# a remark\n\nb slots=4  # the second\nc slots=2\n"


@pytest.fixture
def plan_of(base, chat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "hosts").write_text(HOSTS)

    def make(*overrides: str, world: int | None = None):
        stock = (f"model.name_or_path={base}", f"dataset.path={chat}", f"runs_dir={tmp_path / 'runs'}")
        return api.compose(*stock, *CPU, *overrides, world_size=world)

    return make


# ---- how many nodes and processes ----

FILE = "launch.hostfile=hosts"
COUNTS = {
    "launch.num_nodes=3 launch.num_gpus=2 launch=torchrun": (3, 2),
    f"{FILE} launch.num_nodes=2": (2, 4),
    f"{FILE} launch.num_gpus=2": (3, 2),
    f"{FILE} launch.num_nodes=1 launch.num_gpus=3": (1, 3),
    f"{FILE} launch.include='a@b:0,2@c'": None,
    f"{FILE} launch.include='b:0,2@c'": (2, 2),  # in the file's order, as many on each
    f"{FILE} launch.exclude=c": (2, 4),
    f"{FILE} launch.exclude=c@b:3@a:0": (2, 3),
    "launch.include='localhost:0,2' launch=deepspeed": (1, 2),
    "launch=deepspeed launch.num_gpus=2": (1, 2),
}


@pytest.mark.parametrize("overrides", COUNTS)
def test_counts(overrides: str, plan_of):
    if COUNTS[overrides] is None:
        with pytest.raises(KitError, match="the nodes have 2, 4 slots"):
            plan_of(*overrides.split())
        return
    plan = plan_of(*overrides.split(), "trainer.per_device_train_batch_size=1", "deepspeed=zero2")
    nodes, each = COUNTS[overrides]
    assert (plan.launch.num_nodes, plan.launch.num_gpus, plan.world_size) == (nodes, each, nodes * each)
    assert plan.global_batch_size == nodes * each * plan.trainer["gradient_accumulation_steps"]
    assert plan.deepspeed["train_batch_size"] == plan.global_batch_size
    assert "torchrun" in overrides or plan.launch.launcher == "deepspeed"


WRONG = {  # (hostfile, overrides): what is said
    ("a slots=4\na slots=2\n", FILE): "hosts:2 names a again",
    ("a slots=4\nb\n", FILE): "hosts:2 is not a line of a hostfile: 'b'",
    ("a slots=0\n", FILE): "hosts:1 is not a line",
    ("$(touch x) slots=1\n", FILE): "hosts:1",
    ("a;reboot slots=1\n", FILE): "'a;reboot' is no host's name",
    ("\n# nobody\n", FILE): "names no host",
    (HOSTS, "launch.hostfile=nowhere"): "nowhere cannot be read",
    (HOSTS, f"{FILE} launch.include=d"): "launch.include names d, which is not among a, b, c",
    (HOSTS, f"{FILE} launch.include=c:2"): "c has no slot 2",
    (HOSTS, f"{FILE} launch.include=a launch.exclude=b"): "both given",
    (HOSTS, f"{FILE} launch.exclude=a@b@c"): "leaves nothing",
    (HOSTS, f"{FILE} launch.num_nodes=4 launch.num_gpus=1"): "launch.num_nodes=4, but the hostfile",
    (HOSTS, f"{FILE} launch.num_gpus=3"): "launch.num_gpus=3, but the hostfile",
    (HOSTS, f"{FILE} launch.include=a launch.num_gpus=2"): "launch.num_gpus=2, but the hostfile",
    (HOSTS, f"{FILE} launch.exclude=c launch=torchrun"): "torchrun knows no launch.hostfile",
    (HOSTS, f"{FILE} launch.exclude=c launch.node_rank=0"): "one command reaches all nodes",
    (HOSTS, "launch=local launch.num_nodes=2"): "launch=local starts one process",
    (HOSTS, "launch.num_nodes=0"): "launch.num_nodes must be at least 1",
    (HOSTS, "launch.num_nodes=2 launch.num_gpus=1 launch.node_rank=2"): "node 2 of 2",
    ("a slots=99999999999\n", FILE): "hosts:1: more than 1024 slots",
    ("a slots=\u0662\n", FILE): "hosts:1 is not a line",
    (HOSTS, "launch=deepspeed launch.include='localhost:999999999'"): "launch.include names slot 999999999",
    (HOSTS, "launch.master_addr='a b'"): "launch.master_addr",
    (HOSTS, "launch.include='a;b'"): "launch.include",
}


@pytest.mark.parametrize("file, overrides", WRONG)
def test_refused(file: str, overrides: str, plan_of, tmp_path):
    (tmp_path / "hosts").write_text(file)
    with pytest.raises(KitError) as refused:
        plan_of(*shlex.split(overrides))
    assert WRONG[file, overrides] in str(refused.value)
    assert all(p.rule for p in refused.value.problems)


# ---- what is typed ----


def after(argv: list[str], *names: str) -> dict[str, str]:
    return {name: argv[argv.index(f"--{name}") + 1] for name in names}


def test_deepspeed_with_ssh(plan_of, tmp_path):
    plan = plan_of(FILE, "launch.num_nodes=2", "launch.num_gpus=2", "deepspeed=zero2")
    argv, _ = command.launch_command(plan, Path("/x/plan.json"))
    assert argv[1:3] == ["-m", "deepspeed.launcher.runner"] and "--no_ssh" not in argv and "--force_multi" in argv
    assert after(argv, "hostfile", "num_nodes", "num_gpus", "launcher") == {
        "hostfile": str(tmp_path / "hosts"), "num_nodes": "2", "num_gpus": "2", "launcher": "pdsh"
    }  # fmt: skip
    assert "--master_addr" not in argv  # DeepSpeed asks the first host
    assert argv[-4:] == ["--no_local_rank", "--module", "kit.worker", "/x/plan.json"]
    argv, _ = command.launch_command(plan_of(FILE, "launch.exclude=c", "launch.master_addr=10.0.0.1"), Path("p"))
    assert after(argv, "exclude", "master_addr") == {"exclude": "c", "master_addr": "10.0.0.1"}
    assert "--num_nodes" not in argv and "--num_gpus" not in argv  # DeepSpeed takes one or the other
    from deepspeed.launcher.runner import parse_args

    assert parse_args(argv[3:]).launcher_args == "-N"


def test_one_node_of_several(plan_of, monkeypatch, tmp_path):
    two = ("launch.num_nodes=2", "launch.num_gpus=4", "launch.node_rank=1", "launch.master_addr=gpu-01")
    plan = node.resolve_node(plan_of("launch=deepspeed", "launch.no_ssh=true", *two))
    argv, env = command.launch_command(plan, Path("p"))
    read = after(argv, "node_rank", "master_addr", "master_port", "hostfile", "num_nodes", "num_gpus")
    assert "--no_ssh" in argv and (read["node_rank"], read["master_addr"]) == ("1", "gpu-01")
    assert (read["num_nodes"], read["num_gpus"]) == ("2", "4") and 20_000 <= int(read["master_port"]) < 30_000
    assert Path(read["hostfile"]).read_text() == "node0 slots=4\nnode1 slots=4\n"
    assert "KIT_VISIBLE_DEVICES" not in env
    argv, _ = command.launch_command(
        node.resolve_node(plan_of(FILE, "launch.exclude=c", "launch.no_ssh=true", *two[2:])), Path("p")
    )
    assert after(argv, "hostfile", "exclude", "node_rank")["hostfile"] == str(tmp_path / "hosts")
    argv, _ = command.launch_command(
        node.resolve_node(plan_of("launch=torchrun", *two, "launch.master_port=29501")), Path("p")
    )
    assert after(argv, "nnodes", "node_rank", "nproc_per_node", "master_addr", "master_port") == {
        "nnodes": "2", "node_rank": "1", "nproc_per_node": "4", "master_addr": "gpu-01", "master_port": "29501"
    }  # fmt: skip


@pytest.mark.parametrize("devices", ["2,3,5,7", "GPU-aa,GPU-bb,MIG-cc,MIG-dd"])
def test_devices_of_a_batch_system_stay(devices: str, plan_of, monkeypatch):
    """DeepSpeed counts from 0: the worker puts back what the node was given."""
    two = ("launch.num_nodes=2", "launch.num_gpus=3", "launch.node_rank=0", "launch.master_addr=a")
    plan = plan_of("launch=deepspeed", "launch.no_ssh=true", *two, "trainer.use_cpu=false", "deepspeed=zero2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    _, env = command.launch_command(node.resolve_node(plan), Path("p"))
    assert env["KIT_VISIBLE_DEVICES"] == ",".join(devices.split(",")[:3])
    one, env = command.launch_command(
        plan_of("launch=deepspeed", "launch.num_gpus=3", "trainer.use_cpu=false"), Path("p")
    )
    assert ("--include" in one) != ("KIT_VISIBLE_DEVICES" in env)


# ---- which node this is ----

SLURM = {"SLURM_NODEID": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "gpu[03-07,11],login1"}


@pytest.mark.parametrize(
    "env, rank, address",
    [
        (SLURM, 1, "gpu03"),
        ({**SLURM, "NODE_RANK": "0", "MASTER_ADDR": "first"}, 0, "first"),
        ({"JOB_COMPLETION_INDEX": "1", "MASTER_ADDR": "pod-0.run"}, 1, "pod-0.run"),
        ({**SLURM, "SLURM_JOB_NODELIST": "n1,n2"}, 1, "n1"),
        ({**SLURM, "SLURM_JOB_NODELIST": "r[1,3]-gpu,x"}, 1, "r1-gpu"),
    ],
)
def test_a_batch_system_says_it(env: dict[str, str], rank: int, address: str, plan_of):
    plan = plan_of("launch=torchrun", "launch.num_nodes=2", "launch.num_gpus=2")
    placed = node.resolve_node(plan, env)
    assert (placed.launch.node_rank, placed.launch.master_addr) == (rank, address)
    assert placed.launch.master_port == node.resolve_node(plan, {**env, "NODE_RANK": "0"}).launch.master_port
    other = plan.model_copy(update={"run_dir": plan.run_dir + "-2"})
    assert placed.launch.master_port != node.resolve_node(other, env).launch.master_port  # two runs of one job
    assert list(node.ranks_of_node(placed)) == [2 * rank, 2 * rank + 1]


def test_a_node_that_nobody_numbered(plan_of):
    plan = plan_of("launch=torchrun", "launch.num_nodes=2", "launch.num_gpus=2")
    with pytest.raises(KitError, match="has no number") as refused:
        node.resolve_node(plan, {})
    assert len(refused.value.problems) == 2  # and nobody says where node 0 is
    with pytest.raises(KitError, match="node 5 of 2"):
        node.resolve_node(plan, {"NODE_RANK": "5", "MASTER_ADDR": "a"})
    assert node.resolve_node(plan_of("launch=deepspeed", "launch.num_gpus=2"), SLURM).launch.node_rank is None
    with pytest.raises(KitError, match="node 0 does, and makes its directory"):
        api.train(plan=plan_of("launch=torchrun", "launch.num_nodes=2", "launch.num_gpus=2", "launch.node_rank=1"))


def test_node_0_is_the_first_that_is_chosen(plan_of, tmp_path):
    """And a hostfile that is gone when the run starts is a refusal."""
    plan = plan_of(FILE, "launch.include='b:0,2@c'", "launch.no_ssh=true", "launch.node_rank=0", "deepspeed=zero2",
                   "trainer.per_device_train_batch_size=1")  # fmt: skip
    assert node.resolve_node(plan, {}).launch.master_addr == "b"
    (tmp_path / "hosts").unlink()
    for ask in (lambda: node.resolve_node(plan, {}), lambda: ssh.selected_hosts(plan)):
        with pytest.raises(KitError, match="hosts cannot be read"):
            ask()


LAUNCH_NODE = {  # words and environment of `kit launch-node`: what is said
    ("--node-rank -1 --master-addr a", ""): "node -1 of 2",
    ("--node-rank 1 --master-addr a --master-port 0", ""): "0 is no port",
    ("--node-rank 1 --master-addr a --master-port 99999", ""): "99999 is no port",
    ("--node-rank 1 --master-addr a", "MASTER_PORT=70000"): "70000 is no port",
    ("--node-rank 1 --master-addr a;id", ""): "'a;id' is no host's name",
    ("--node-rank 1", "MASTER_ADDR=-x"): "'-x' is no host's name",
    ("--master-addr a", "NODE_RANK=\u00b2"): "has no number",
    ("--node-rank 1 --master-addr a --resume checkpoint-9", ""): "there is no checkpoint-9",
}


@pytest.mark.parametrize("words, env", LAUNCH_NODE)
def test_launch_node_refuses(words: str, env: str, plan_of, monkeypatch, capsys):
    """Before anything waits for the other nodes."""
    run = frozen(plan_of("launch=torchrun", "launch.num_nodes=2", "launch.num_gpus=1", "trainer.use_cpu=true"))
    if env:
        monkeypatch.setenv(*env.split("="))
    assert cli.run_verb(["launch-node", str(run), *words.split()]) == REFUSED
    said = capsys.readouterr().err
    assert LAUNCH_NODE[words, env] in said and "fix:" in said


def test_a_number_for_the_node_of_a_run_that_has_one(plan_of, capsys):
    run = frozen(plan_of("trainer.use_cpu=true"))
    assert cli.run_verb(["launch-node", str(run), "--node-rank", "1"]) == REFUSED
    assert "planned for one node" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [({"format": 2, "news": 1}, "a plan of format 2, this kit reads 1"), ({"launch": None}, "is not a plan: launch")],
)
def test_a_plan_that_cannot_be_read(change: dict, said: str, plan_of, capsys):
    run = frozen(plan_of("trainer.use_cpu=true"))
    (run / "plan.json").write_text(json.dumps({**json.loads((run / "plan.json").read_text()), **change}))
    assert cli.run_verb(["launch-node", str(run)]) == REFUSED
    shown = capsys.readouterr().err
    assert said in shown and "where:" in shown and "fix:" in shown


def frozen(plan) -> Path:
    return run_directory.create_run_directory(plan).run_path


def test_a_port_that_the_nodes_cannot_have(plan_of):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        two = ("launch=torchrun", "launch.num_nodes=2", "launch.num_gpus=1", f"launch.master_port={port}")
        with pytest.raises(KitError, match=f"port {port} cannot be taken"):
            node.check_port_is_free(plan_of(*two))


@pytest.mark.parametrize(
    "env, ranks",
    [
        ({"RANK": "3", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2",
          "SLURM_LOCALID": "0"}, ("3", "4", None, None)),
        ({**SLURM, "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0",
          "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, ("5", "8", "1", "gpu03")),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
          "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, ("2", "4", "0", "a")),
        ({**SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (None, None, None, None)),  # the batch script itself
    ],
)  # fmt: skip
def test_ranks_of_srun_and_mpirun(env: dict[str, str], ranks: tuple, monkeypatch):
    for name in [n for n in os.environ if n.startswith(("SLURM_", "OMPI_", "MASTER_", "RANK", "WORLD", "LOCAL_"))]:
        monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "x")  # so that it is taken back afterwards
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    worker.set_rank_variables()
    assert tuple(os.environ.get(n) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")) == ranks
    if ranks[2] == "1":
        assert os.environ["LOCAL_SIZE"] == "4" and 20_000 <= int(os.environ["MASTER_PORT"]) < 30_000


# ---- what reaches the nodes ----


def test_the_environment_of_other_nodes(plan_of, tmp_path, monkeypatch):
    plan = run_directory.create_run_directory(
        plan_of(FILE, "launch.num_nodes=2", "launch.num_gpus=1", "deepspeed=zero2")
    )
    secrets = {"HF_TOKEN": "hf_aaaaaaaaaaaaaaaaaaaaaaaa", "WANDB_API_KEY": "k" * 40, "MLFLOW_TRACKING_PASSWORD": "pw",
               "HF_ENDPOINT": "https://me:word@mirror", "HF_NOTE": "hf_" + "a" * 30}  # fmt: skip
    plain = {"HF_HOME": "/data/hf", "HF_HUB_OFFLINE": "1", "NCCL_DEBUG": "INFO", "CUDA_HOME": "/usr/local/cuda",
             "TOKENIZERS_PARALLELISM": "false", "TORCH_EXTENSIONS_DIR": "/ext", "WANDB_MODE": "offline"}  # fmt: skip
    other = {"KIT_SHELL": "$(reboot)", "LANG": "C", "CUDA_VISIBLE_DEVICES": "0", "MASTER_PORT": "1"}
    for name, value in {**secrets, **plain, **other}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".deepspeed_env").write_text("NCCL_IB_HCA=mlx5\nGITHUB_TOKEN=ghp_x\nMINE='a b'\nno line\n")
    said: list[str] = []
    env = ssh.write_remote_environment(plan, command.rank_environment(plan), said.append)
    lines = Path(env["DS_ENV_FILE"]).read_text().splitlines()
    sent = dict(line.split("=", 1) for line in lines)
    assert {k: sent[k] for k in plain} == plain and sent["DS_ACCELERATOR"] == "cpu"
    assert (sent["NCCL_IB_HCA"], sent["MINE"]) == ("mlx5", "a b")
    assert not {*secrets, *other, "GITHUB_TOKEN"} & set(sent)
    assert env["MLFLOW_TRACKING_PASSWORD"] == "" and "HF_TOKEN" not in env  # DeepSpeed itself would send the first
    assert {s.split()[0] for s in said} == {*secrets, "GITHUB_TOKEN", "KIT_SHELL"}
    assert not any(value in line for value in secrets.values() for line in said)


@pytest.mark.launch
def test_deepspeed_reads_the_file_that_is_named(plan_of, tmp_path, monkeypatch):
    """DS_ENV_FILE with an absolute path stands for both places where the deepspeed command looks."""
    script = "from deepspeed.launcher import runner as r; import os, json; print(json.dumps([os.path.join(p, "
    script += "r.DEEPSPEED_ENVIRONMENT_NAME) for p in r.DEEPSPEED_ENVIRONMENT_PATHS]))"
    env = {**os.environ, "DS_ENV_FILE": "/run/x/deepspeed_env", "DS_ACCELERATOR": "cpu"}
    said = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert json.loads(said.stdout.splitlines()[-1]) == ["/run/x/deepspeed_env"] * 2, said.stderr[-500:]


def test_nodes_are_asked_before(plan_of, tmp_path, monkeypatch):
    plan = run_directory.create_run_directory(plan_of(FILE, "launch.exclude=c", "deepspeed=zero2"))
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "ssh"
    fake.write_text('#!/bin/bash\n[ "$5" = b ] && { echo "b: no route" >&2; exit 255; }\necho python\n')
    (tmp_path / "bin" / "pdsh").write_text("#!/bin/sh\n")
    for file in ("ssh", "pdsh"):
        (tmp_path / "bin" / file).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(KitError) as refused:
        ssh.check_nodes_reachable(plan)
    assert [p.problem for p in refused.value.problems] == [
        "a does not see the run directory", "b is not reached with ssh: b: no route"
    ]  # fmt: skip
    fake.write_text('#!/bin/bash\neval "$6"\n')
    ssh.check_nodes_reachable(plan)
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    with pytest.raises(KitError, match="pdsh is not installed"):
        ssh.check_nodes_reachable(plan)


# ---- who is ended, and by whom ----


def test_only_ranks_of_this_machine_and_node(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    here = socket.gethostname()
    for rank, text in enumerate([f"{os.getpid()}", f"{os.getpid()} {here}", f"{os.getpid()} elsewhere", "", "9 9 9"]):
        (logs / f"rank{rank}.pid").write_text(text)
    assert [rank for rank, _ in ranks.recorded_pids(tmp_path)] == [0, 1]
    assert ranks.living_rank_pids(tmp_path, range(1, 3)) == [os.getpid()]
    ranks.remove_rank_files(tmp_path, range(1, 3), ".node1")
    assert sorted(p.name for p in logs.glob("*.pid")) == ["rank0.pid", "rank3.pid", "rank4.pid"]


def test_errors_of_other_nodes_end_this_one(tmp_path, monkeypatch):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "rank2.error.json").write_text("{}")  # of an earlier start
    peers = ranks.PeerFailures(tmp_path, range(2))
    monkeypatch.setattr(ranks, "PEER_GRACE_SECONDS", 0.2)
    (logs / "rank1.error.json").write_text("{}")  # our own: its launcher sees to it
    assert not peers.failed() and peers.deadline is None
    (logs / "node1.error.json").write_text("{}")
    assert not peers.failed()
    time.sleep(0.3)
    assert peers.failed()


def test_another_node_waits_for_the_first_ones_word(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(supervise, "STATUS_WAIT_SECONDS", 1)
    run_directory.set_status(tmp_path, "running")
    with pytest.raises(KitError, match="before it was done"):
        supervise.exit_code_of_run(tmp_path, 0, ".node1")
    assert run_directory.read_status(tmp_path)["state"] == "running"  # node 0 keeps it
    assert json.loads((tmp_path / "logs" / "node1.error.json").read_text())["code"] == 4
    run_directory.set_status(tmp_path, "done")
    assert supervise.exit_code_of_run(tmp_path, 0, ".node1") == 0


def test_what_an_earlier_start_left_is_not_this_ones_end(tmp_path, monkeypatch):
    """A node whose ranks cannot even start, while node 0 has not yet begun: that is no stop with a checkpoint."""
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(supervise, "STATUS_WAIT_SECONDS", 1)
    run_directory.set_status(tmp_path, "stopped", step=5)
    before = run_directory.read_status(tmp_path)
    for there in (False, True):
        if there:
            problems = [{"problem": "no module", "where": "", "fix": ""}]
            atomic_write_json(tmp_path / "logs" / "rank2.error.json", {"code": 4, "problems": problems})
        with pytest.raises(KitError, match="no module" if there else "before it was done"):
            supervise.exit_code_of_run(tmp_path, 1, ".node1", before)
    run_directory.set_status(tmp_path, "stopped", step=9)
    assert supervise.exit_code_of_run(tmp_path, 0, ".node1", before) == STOPPED


@pytest.mark.launch
def test_a_word_in_the_run_directory_stops_ranks(tmp_path):
    (tmp_path / "logs").mkdir()
    script = "import sys, time; from pathlib import Path; from kit.training import signals, watchdog\n"
    script += "watchdog.watch_stop_file(Path(sys.argv[1]))\nprint('ready', flush=True)\n"
    script += "while not signals.received_signal(): time.sleep(0.05)\nprint('asked', flush=True)\ntime.sleep(60)"
    argv = [sys.executable, "-c", script, str(tmp_path)]
    ssh.request_remote_stop(tmp_path, "now")  # an earlier start's last word
    os.utime(tmp_path / "logs" / ssh.STOP_FILE, (0, 0))
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        ssh.request_remote_stop(tmp_path, "save")
        assert process.stdout.readline() == "asked\n"
        ssh.request_remote_stop(tmp_path, "now")
        assert process.wait(10) == 4


def test_what_is_refused_leaves_no_directory(plan_of, tmp_path, monkeypatch):
    """Or the next try, with the number of the node, would be told that the run is there, unfinished."""
    two = ("launch=torchrun", "launch.num_nodes=2", "launch.num_gpus=1", "trainer.use_cpu=true")
    plan = plan_of(*two)
    for env in ({}, {"NODE_RANK": "0"}, {"NODE_RANK": "1", "MASTER_ADDR": "a"}):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(KitError, match="node 0"):
            api.train(plan=plan)
        assert not plan.run_path.exists()


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("HF_TOKEN", "x", True), ("wandb_api_key", "x", True), ("AWS_SECRET_ACCESS_KEY", "x", True),
        ("MLFLOW_TRACKING_PASSWORD", "x", True), ("MY_NOTE", "hf_" + "a" * 30, True), ("X", "sk-" + "a" * 30, True),
        ("X", "glpat-" + "a" * 20, True), ("X", "github_pat_" + "a" * 30, True), ("X", "AKIA" + "A" * 16, True),
        ("BLOB_CONNECTION_STRING", "AccountName=x", True),
        ("HF_ENDPOINT", "https://me:word@mirror", True), ("HF_ENDPOINT", "https://mirror:8080/a", False),
        ("HF_TOKEN_PATH", "/home/me/token", False), ("SSH_AUTH_SOCK", "/tmp/agent", False),
        ("TOKENIZERS_PARALLELISM", "false", False), ("KEYBOARD", "de", False), ("PASSED", "1", False),
    ],
)  # fmt: skip
def test_which_variables_are_secrets(name: str, value: str, secret: bool):
    assert is_secret(name, value) is secret
