"""Runs on two "nodes" of this machine: two network namespaces without ssh, two sshd with it; two runs at once.

Every run is the same description; its losses equal those of one node with two processes.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.launchers.command import free_port
from launch import harness

pytestmark = pytest.mark.launch
LOSS = 1.5e-6
TWO = ("deepspeed=zero2", "trainer.dataloader_num_workers=0")
SECRET = "hf_" + "A1b2" * 8


@pytest.fixture(scope="module")
def work(tmp_path_factory, ops_dir) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def at_once(work, base, chat) -> list[Path]:
    """Two runs of two processes at the same time on one machine, from one folder into one folder."""
    started = []
    for seed in (7, 8):
        more = (*TWO, "launch=deepspeed", "launch.num_gpus=2", f"trainer.seed={seed}", f"name=seed{seed}")
        argv = ["train", *harness.overrides(base, chat, work / "once", *more)]
        started.append(harness.start([sys.executable, "-m", "kit", *argv], work))
    done = [harness.finish(process) for process in started]
    for one in done:
        assert one.returncode == 0, one.stdout[-3000:] + one.stderr[-3000:]
    runs = [next((work / "once").glob(f"seed{seed}-*")) for seed in (7, 8)]
    for run in runs:
        harness.assert_nothing_left(run)
    return runs


def test_two_runs_at_once_share_nothing(at_once):
    ports, losses = set(), []
    for run in at_once:
        launched = json.loads((run / "launch.json").read_text())
        assert launched["ended"]["returncode"] == 0 and harness.status(run)["state"] == "done"
        ports.add(launched["argv"][launched["argv"].index("--master_port") + 1])
        losses.append(harness.rows(run))
    assert len(ports) == 2
    assert sorted(losses[0]) == sorted(losses[1]) == list(range(1, 21)) and losses[0] != losses[1]


def equal(run: Path, reference: Path) -> None:
    ours, theirs = harness.rows(run), harness.rows(reference)
    assert sorted(ours) == sorted(theirs)
    assert max(abs(ours[step] - theirs[step]) for step in ours) <= LOSS


# ---- without ssh: two network namespaces, each with its own kit ----


@pytest.fixture(scope="module")
def spaces() -> Iterator[dict[str, str]]:
    """Name of each namespace and its address; a cable between them, and nothing else."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    mark = os.getpid() % 10_000
    names, cable = [f"kit{mark}a", f"kit{mark}b"], [f"kc{mark}a", f"kc{mark}b"]
    if subprocess.run(["ip", "netns", "add", names[0]], capture_output=True).returncode:
        pytest.skip("network namespaces cannot be made here")
    found = {name: f"10.213.7.{n}" for n, name in enumerate(names, 1)}
    try:
        ip("netns", "add", names[1])
        ip("link", "add", cable[0], "netns", names[0], "type", "veth", "peer", "name", cable[1], "netns", names[1])
        for name, end in zip(names, cable, strict=True):
            ip("-n", name, "addr", "add", f"{found[name]}/24", "dev", end)
            for device in (end, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield found
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def in_space(name: str, *argv: str, cwd: Path) -> subprocess.Popen[str]:
    return harness.start(["ip", "netns", "exec", name, sys.executable, "-m", "kit", *argv], cwd)


def made(runs: Path, process: subprocess.Popen[str]) -> Path:
    """The run directory, once the first node has made it and holds its lock."""
    harness.wait_for(lambda: list(runs.glob("*/launch.json")), 120, process)
    return harness.the_run(runs)


def both(first: subprocess.Popen[str], second: subprocess.Popen[str]) -> list[subprocess.CompletedProcess[str]]:
    return [harness.finish(process) for process in (first, second)]


def steps(run: Path, least: int):
    return lambda: (run / "metrics.jsonl").exists() and len(harness.rows(run)) >= least


def test_deepspeed_no_ssh(work, base, chat, spaces, at_once):
    """`kit train` on node 0, `kit launch-node` on the other, with what node 0 prints; then a rank is killed."""
    (a, address), (b, _) = spaces.items()
    wanted = (
        "launch=deepspeed",
        "launch.num_nodes=2",
        "launch.num_gpus=1",
        "launch.no_ssh=true",
        "launch.node_rank=0",
    )
    runs, more = work / "no_ssh", (*TWO, *wanted, f"launch.master_addr={address}")
    first = in_space(a, "train", *harness.overrides(base, chat, runs, *more), cwd=work)
    run = made(runs, first)
    launched = json.loads((run / "launch.json").read_text())["argv"]
    assert "--no_ssh" in launched and launched[launched.index("--node_rank") + 1] == "0"
    port = launched[launched.index("--master_port") + 1]
    told = ["--node-rank", "1", "--master-addr", address, "--master-port", port]
    second = in_space(b, "launch-node", str(run / "plan.json"), *told, cwd=work)
    done = both(first, second)
    assert [d.returncode for d in done] == [0, 0], [d.stderr[-2000:] for d in done]
    assert f"kit launch-node {run / 'plan.json'} --master-addr {address} --master-port {port}" in done[0].stderr
    equal(run, at_once[0])
    harness.assert_nothing_left(run)

    started = time.monotonic()  # the same frozen plan, on both nodes by the same words
    first, second = (
        in_space(name, "launch-node", str(run), "--node-rank", rank, *told[2:], cwd=work)
        for name, rank in ((a, "0"), (b, "1"))
    )
    (run / "metrics.jsonl").unlink()
    harness.wait_for(steps(run, 1), 120, first)
    os.kill(int((run / "logs" / "rank1.pid").read_text().split()[0]), signal.SIGKILL)
    killed = time.monotonic()
    done = both(first, second)
    assert [d.returncode for d in done] == [4, 4], [d.stderr[-2000:] for d in done]
    assert time.monotonic() - killed < 60, time.monotonic() - started
    assert harness.status(run)["state"] == "failed"
    harness.assert_nothing_left(run)


def test_torchrun_on_two_nodes_stops_and_goes_on(work, base, chat, spaces, at_once):
    """The environment says where a node is; a signal on node 1 stops both at one step; both resume."""
    (a, address), (b, _) = spaces.items()
    wanted = ("launch=torchrun", "launch.num_nodes=2", "launch.num_gpus=1", "launch.node_rank=0")
    runs, more = work / "torchrun", (*TWO, *wanted, f"launch.master_addr={address}", "trainer.save_steps=50")
    more = (*more, "trainer.load_best_model_at_end=false")
    first = in_space(a, "train", *harness.overrides(base, chat, runs, *more), cwd=work)
    run = made(runs, first)
    second = in_space(b, "launch-node", str(run), "--node-rank", "1", cwd=work)  # the plan holds the address
    harness.wait_for(steps(run, 3), 120, first)
    second.send_signal(signal.SIGTERM)
    done = both(first, second)
    assert [d.returncode for d in done] == [75, 75], [d.stderr[-2000:] for d in done]
    harness.assert_nothing_left(run)
    first, second = (
        in_space(name, "launch-node", str(run), "--node-rank", rank, "--resume", "newest", cwd=work)
        for name, rank in ((a, "0"), (b, "1"))
    )
    done = both(first, second)
    assert [d.returncode for d in done] == [0, 0], [d.stderr[-2000:] for d in done]
    equal(run, at_once[0])


# ---- with ssh: DeepSpeed reaches two sshd of the test's own ----


@pytest.fixture(scope="module")
def sshd(tmp_path_factory) -> Iterator[Path]:
    """A folder with `ssh` (with our own configuration, keys and known hosts) and `hostfile`, of nodes with names."""
    tools = {name: shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") for name in ("sshd", "ssh", "pdsh")}
    if missing := [name for name, path in tools.items() if not path]:
        pytest.skip(f"{', '.join(missing)} not installed (apt-get install openssh-server pdsh)")
    if os.geteuid() != 0:
        pytest.skip("a host name of their own for the two sshd needs root")
    folder = tmp_path_factory.mktemp("sshd")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd parts with its privileges
    servers, config = [], []
    for name, address in (("node-a", "127.0.0.2"), ("node-b", "127.0.0.3")):
        port = free_port()
        (folder / f"{name}.conf").write_text(
            f"ListenAddress {address}:{port}\nHostKey {folder}/host\nPidFile none\nUsePAM no\nStrictModes no\n"
            f"PasswordAuthentication no\nPermitRootLogin yes\nAuthorizedKeysFile {folder}/authorized_keys\n"
        )
        config.append(
            f"Host {name}\n  HostName {address}\n  Port {port}\n  User {getpass.getuser()}\n  IdentitiesOnly yes\n"
            f"  IdentityFile {folder}/user\n  UserKnownHostsFile {folder}/known\n  StrictHostKeyChecking no\n"
            "  LogLevel ERROR\n"
        )
        serve = f"hostname {name} && exec {tools['sshd']} -D -e -f {folder}/{name}.conf"
        log = open(folder / f"{name}.log", "w")
        servers.append(subprocess.Popen(["unshare", "--uts", "sh", "-c", serve], stderr=log, stdin=subprocess.DEVNULL))
    (folder / "config").write_text("".join(config))
    (folder / "ssh").write_text(f'#!/bin/sh\nexec {tools["ssh"]} -F {folder}/config "$@"\n')
    (folder / "ssh").chmod(0o755)
    (folder / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n")
    try:
        for name in ("node-a", "node-b"):
            reach(folder, name)
        yield folder
    finally:
        for server in servers:
            server.terminate()
            server.wait(10)


def reach(folder: Path, name: str) -> None:
    for _ in range(50):
        said = subprocess.run([str(folder / "ssh"), name, "hostname"], capture_output=True, text=True, timeout=20)
        if said.stdout.strip() == name:
            return
        time.sleep(0.2)
    pytest.fail(f"no login at {name}: {said.stderr.strip()} {(folder / f'{name}.log').read_text()[-500:]}")


def test_deepspeed_over_ssh(work, base, chat, sshd, at_once):
    """One command; the environment arrives, secrets do not; Ctrl-C here saves there; `kit resume` goes on."""
    runs = work / "ssh"
    wanted = ("launch=deepspeed", f"launch.hostfile={sshd / 'hostfile'}", "launch.master_addr=127.0.0.2")
    more = (*TWO, *wanted, "trainer.save_steps=50", "trainer.load_best_model_at_end=false")
    env = {"PATH": f"{sshd}{os.pathsep}{os.environ['PATH']}", "HF_TOKEN": SECRET, "KIT_WORD": "a b", "MLFLOW_X": "1"}
    env |= {"MLFLOW_TRACKING_TOKEN": SECRET}
    argv = [sys.executable, "-m", "kit", "train", *harness.overrides(base, chat, runs, *more)]
    first = harness.start(argv, work, **env)
    run = made(runs, first)
    harness.wait_for(steps(run, 3), 150, first)
    words = [(run / "logs" / f"rank{rank}.pid").read_text().split() for rank in (0, 1)]
    assert [host for _, host in words] == ["node-a", "node-b"]
    seen = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid, _ in words]
    first.send_signal(signal.SIGINT)
    for variables in seen:
        assert b"KIT_WORD=a b" in variables and b"MLFLOW_X=1" in variables and b"DS_ACCELERATOR=cpu" in variables
        assert b"HF_HUB_OFFLINE=1" in variables and not any(SECRET.encode() in v for v in variables)
    done = harness.finish(first)
    assert done.returncode == 75, done.stderr[-3000:]
    assert "HF_TOKEN looks like a secret" in done.stderr
    harness.assert_nothing_left(run)
    for file in run.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file

    done = harness.kit("resume", str(run), cwd=work, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    equal(run, at_once[0])
    harness.assert_nothing_left(run)


def test_a_node_that_is_not_reached(work, base, chat, sshd):
    (sshd / "wrong").write_text("node-a slots=1\nnode-c slots=1\n")
    more = ("launch=deepspeed", f"launch.hostfile={sshd / 'wrong'}", "launch.master_addr=127.0.0.2", "deepspeed=zero2")
    path = f"{sshd}{os.pathsep}{os.environ['PATH']}"
    done = harness.kit("train", *harness.overrides(base, chat, work / "wrong", *more), cwd=work, PATH=path)
    assert done.returncode == 3
    assert "node-c is not reached with ssh" in done.stderr and "Traceback" not in done.stderr
