"""A SLURM cluster of two nodes on this machine, in a private directory with its own key and ports; gone afterwards.

Needs root and Debian's slurmctld, slurmd, slurm-client and munge. Nothing of the system's own SLURM, if there is one,
is read or touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from kit.launchers.command import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
CONF = """\
ClusterName=kit
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool.%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=3600
MaxArraySize=100
NodeName=kit1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs={cpus} RealMemory={memory} State=UNKNOWN
NodeName=kit2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes=kit1 Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=kit1 MaxTime=60 State=UP PriorityTier=9 GraceTime=0
PartitionName=both Nodes=kit1,kit2 MaxTime=60 State=UP PriorityTier=1 GraceTime=30
"""


def missing() -> str:
    """Why a cluster cannot be made here; "" where it can."""
    where = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=where)]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: apt-get install slurmctld slurmd slurm-client munge)"
    return "" if os.geteuid() == 0 else "a SLURM of one's own needs root"


@contextlib.contextmanager
def running(home: Path, cpus: int = 2) -> Iterator[dict[str, str]]:
    """Start the daemons below `home`; yields the environment in which sbatch and the others speak to them."""
    host, daemons = socket.gethostname().partition(".")[0], []
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    for folder in ("state", "spool.kit1", "spool.kit2"):
        (home / folder).mkdir(parents=True, mode=0o755)
    (home / "munge").mkdir(mode=0o700)
    key = home / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    memory = psutil.virtual_memory().total // 2**20 // 2
    ports = [free_port() for _ in range(3)]
    conf = home / "slurm.conf"
    settings = {"controller": ports[0], "first": ports[1], "second": ports[2], "cpus": cpus, "memory": memory}
    conf.write_text(CONF.format(home=home, host=host, **settings))
    env = {**os.environ, "SLURM_CONF": str(conf), "PATH": path}
    # The socket's folder need not be trusted here: --force; the key is this cluster's own.
    munge = [
        "munged", "--foreground", "--force", f"--socket={home}/munge.socket", f"--key-file={key}",
        f"--log-file={home}/munge.log", f"--pid-file={home}/munge.pid", f"--seed-file={home}/munge.seed",
    ]  # fmt: skip

    def slurmd(node: str) -> list[str]:
        return ["slurmd", "-D", "-f", str(conf), "-N", node]

    def idle(node: str) -> bool:
        return answers(env, "sinfo", "-h", "-n", node, "-o", "%T", expect="idle")

    try:
        for argv, ready in (
            (munge, lambda: (home / "munge.socket").exists()),
            (["slurmctld", "-D", "-f", str(conf)], lambda: answers(env, "scontrol", "ping", expect="is UP")),
            (slurmd("kit1"), lambda: idle("kit1")),
            (slurmd("kit2"), lambda: idle("kit2")),
        ):
            with open(home / f"{argv[0]}{len(daemons)}.out", "w") as out:
                daemon = subprocess.Popen(argv, env=env, stdout=out, stderr=out, start_new_session=True)
            daemons.append(daemon)
            wait_until(ready, 60, daemon, home)
        yield env
    finally:
        if len(daemons) == 4:
            with contextlib.suppress(subprocess.SubprocessError):
                subprocess.run(["scancel", "--user=root"], env=env, timeout=30, capture_output=True)
                end = time.monotonic() + 40
                while answers(env, "squeue", "-h", expect=" ") and time.monotonic() < end:
                    time.sleep(0.3)
        for daemon in reversed(daemons):
            end_tree(daemon)


def answers(env: dict[str, str], *argv: str, expect: str) -> bool:
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=30)
    return done.returncode == 0 and expect in done.stdout


def wait_until(ready, seconds: float, daemon: subprocess.Popen[bytes], home: Path) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if daemon.poll() is not None or time.monotonic() > end:
            logs = "\n".join(f"{f.name}: {f.read_text()[-1500:]}" for f in sorted(home.glob("*.log")))
            raise AssertionError(f"{daemon.args[0]} did not come up\n{logs}")
        time.sleep(0.2)


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """At once: nothing of this cluster is kept."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    process.kill()
    process.wait()
