"""Starting and stopping without the training stack: argv, environment, operator builds, locks, the worker's door."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from kit import api, worker
from kit.errors import ENVIRONMENT, REFUSED, KitError
from kit.launchers import command, ops, supervise
from kit.storage import run_directory
from kit.system import hardware
from kit.system.hardware import Gpu


def refused_beside(run: Path, lock: str, module: str, *more: str) -> None:
    """Started with a plan whose run another process has, a module refuses and leaves the directory as it was."""
    run_directory.set_status(run, "running")
    pid = run / run_directory.LOGS / "rank0.pid"
    pid.write_text("1")
    argv = [sys.executable, "-m", module, str(run / run_directory.PLAN), *more]
    with run_directory.lock_run_directory(run, lock):
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == REFUSED and "in use by process" in done.stderr, done.stderr
    assert run_directory.read_status(run)["state"] == "running" and pid.read_text() == "1"
    assert not list(pid.parent.glob("*.error.json"))


@pytest.fixture
def plan_of(base, chat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(*overrides: str, here: bool = False):
        stock = (f"model.name_or_path={base}", f"dataset.path={chat}", f"runs_dir={tmp_path / 'runs'}")
        return api.compose(*stock, *overrides, here=here)

    return make


def test_argv_of_each_launcher(plan_of, monkeypatch):
    plan = plan_of("launch=deepspeed", "launch.num_gpus=2", "deepspeed=zero2", "trainer.use_cpu=true")
    argv, env = command.launch_command(plan, Path("/x/plan.json"))
    assert argv[1:5] == ["-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    assert argv[-4:] == ["--no_local_rank", "--module", "kit.worker", "/x/plan.json"]
    assert env["DS_ACCELERATOR"] == "cpu" and env["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert env["PATH"].split(os.pathsep)[0] == os.path.dirname(sys.executable)
    argv, _ = command.launch_command(
        plan_of("launch=torchrun", "launch.num_gpus=2"), Path("p.json"), resume="checkpoint-4"
    )
    assert argv[1:3] == ["-m", "torch.distributed.run"] and argv[-3:] == ["p.json", "--resume", "checkpoint-4"]
    argv, env = command.launch_command(
        plan_of("launch=local", "deepspeed=zero2", "trainer.use_cpu=true"), Path("p.json")
    )
    assert (
        argv[1:] == ["-m", "kit.worker", "p.json"] and env["WORLD_SIZE"] == "1" and env["MASTER_ADDR"] == "127.0.0.1"
    )
    ports = {command.launch_command(plan, Path("p"))[0][argv_index(plan)] for _ in range(5)}
    assert len(ports) == 5  # two runs at once do not meet
    # --num_gpus makes deepspeed forget CUDA_VISIBLE_DEVICES
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert command.device_options(plan.launch) == ["--include", "localhost:2,3"]


def argv_index(plan) -> int:
    argv, _ = command.launch_command(plan, Path("p"))
    return argv.index("--master_port") + 1


def test_precision_and_count_follow_this_machine(plan_of, monkeypatch):
    """What the hardware lacks is refused where the run starts; "auto" takes what it is fast at."""

    def machine(*gpus: Gpu) -> None:
        monkeypatch.setattr(hardware, "list_gpus", lambda: gpus)

    machine(Gpu("T4", 15, (7, 5)))
    assert plan_of(here=True).precision == "float16"
    with pytest.raises(KitError, match="T4 has no bfloat16"):
        plan_of("trainer.bf16=true", here=True)
    machine(Gpu("H200", 139, (9, 0)), Gpu("H200", 139, (9, 0)))
    plan = plan_of("deepspeed=zero2", here=True)
    assert (plan.precision, plan.world_size, plan.launch.launcher) == ("bfloat16", 2, "deepspeed")
    with pytest.raises(KitError, match="8 GPUs asked for, this machine shows 2"):
        plan_of("deepspeed=zero2", "launch.num_gpus=8", here=True)
    machine()
    monkeypatch.setattr(hardware, "cpu_has_bf16_matmul", lambda: False)
    assert (plan_of(here=True).precision, plan_of(here=True).trainer["use_cpu"]) == ("float32", True)
    assert any("25-50 times slower" in w["problem"] for w in plan_of("trainer.bf16=true", here=True).warnings)


@pytest.mark.parametrize("place", ["cpu_adam", "py311_cpu/cpu_adam"])  # below TORCH_EXTENSIONS_DIR, and the default
def test_dead_lock_is_named_and_a_living_one_is_left_alone(place, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / place
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    with pytest.raises(KitError) as refused:
        ops.build_missing_ops(["cpu_adam"], 60, lambda line: None, {"DS_ACCELERATOR": "cpu"})
    assert refused.value.code == ENVIRONMENT
    assert str(folder / "lock") in refused.value.problems[0].where and refused.value.problems[0].fix.startswith("rm ")
    builder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=folder)
    try:
        with pytest.raises(KitError, match=f"process {builder.pid}"):
            ops.build_missing_ops(["cpu_adam"], 60, lambda line: None, {"DS_ACCELERATOR": "cpu"})
        assert (folder / "lock").exists()
    finally:
        builder.kill()
        builder.wait()
    # in the kit's own folder nobody else compiles: the dead lock goes, and is spoken of
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    said: list[str] = []
    ops.clear_stale_locks(tmp_path, "cpu_adam", said.append)
    assert not (folder / "lock").exists() and "removing the lock" in said[0]


def test_a_build_that_takes_too_long_ends_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    said: list[str] = []
    seen: list[psutil.Process] = []

    def look() -> bool:  # asked while the compiler runs: the check below can see one
        seen.extend(builders(tmp_path))
        if seen:  # as torch's builder does some seconds later
            (tmp_path / "cpu_adam").mkdir(exist_ok=True)
            (tmp_path / "cpu_adam" / "lock").touch()
        return False

    with pytest.raises(KitError, match="longer than the limit"):
        ops.build_missing_ops(["cpu_adam"], 1, said.append, {"DS_ACCELERATOR": "cpu"}, look)
    assert seen
    assert "compiling" in said[0]
    assert not list(tmp_path.rglob("lock"))
    assert not builders(tmp_path)
    # asked to stop meanwhile: no error, nothing stamped
    ops.build_missing_ops(["cpu_adam"], 60, said.append, {"DS_ACCELERATOR": "cpu"}, lambda: True)
    assert not list(tmp_path.glob(".built*/cpu_adam"))


def builders(folder: Path) -> list[psutil.Process]:
    """Processes that compile into `folder`; the suite's own operators compile meanwhile, somewhere else."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TORCH_EXTENSIONS_DIR") == str(folder) and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_an_environment_made_anew_compiles_again(tmp_path, monkeypatch):
    """ninja would, in the ranks and without a word: sources that are newer than the operators."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    built = []
    monkeypatch.setattr(ops, "build_op", lambda name, *_: built.append(name) or True)
    cpu = {"DS_ACCELERATOR": "cpu"}
    for _ in range(2):
        ops.build_missing_ops(["cpu_adam"], 60, lambda line: None, cpu)
    assert built == ["cpu_adam"]
    monkeypatch.setattr(ops, "installation_stamp", lambda: "later")
    ops.build_missing_ops(["cpu_adam"], 60, lambda line: None, cpu)
    assert built == ["cpu_adam"] * 2


def test_operators_of_a_plan(plan_of):
    cpu = "trainer.use_cpu=true"
    assert ops.required_ops(plan_of()) == []
    assert ops.required_ops(plan_of("deepspeed=zero2", cpu)) == ["deepspeed_shm_comm"]
    assert ops.required_ops(plan_of("deepspeed=zero3_offload", "launch.num_gpus=2")) == ["cpu_adam"]
    adamw = "+deepspeed.optimizer={type:AdamW,params:{lr:auto}}"  # a file with an optimizer of DeepSpeed's own
    assert ops.required_ops(plan_of("deepspeed=zero2", cpu, adamw)) == ["deepspeed_shm_comm", "fused_adam"]
    assert ops.required_ops(plan_of("deepspeed=zero2_offload", cpu, adamw)) == ["deepspeed_shm_comm", "cpu_adam"]
    nvme = plan_of("deepspeed=zero3_nvme", "deepspeed.zero_optimization.offload_optimizer.nvme_path=/x", cpu)
    assert ops.required_ops(nvme) == ["deepspeed_shm_comm", "cpu_adam", "async_io"]


def test_the_worker_takes_what_launchers_add(monkeypatch):
    assert worker.split_argv(["--local_rank=1", "plan.json"]) == (["plan.json"], None)
    assert worker.split_argv(["--local_rank", "1", "a=b", "--resume", "checkpoint-2"]) == (["a=b"], "checkpoint-2")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(KitError, match="each task would train alone"):
        worker.refuse_bare_srun()


def test_a_console_that_is_gone_does_not_end_the_run(tmp_path):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        tee = worker.Tee(Gone(), log)
        assert tee.write("step 1\n") == 7
        tee.flush()
        latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", write_through=True)
        assert worker.Tee(latin, log).write("é █\n") == 4  # nor one that lacks a letter
    assert (tmp_path / "log").read_text("utf-8") == "step 1\né █\n" and latin.buffer.getvalue() == b"\xe9 \\u2588\n"


def test_a_run_directory_is_one_runs(plan_of):
    plan = run_directory.create_run_directory(plan_of("trainer.use_cpu=true"))
    assert oct(plan.run_path.stat().st_mode)[-3:] == "700"
    assert json.loads((plan.run_path / ".hydra" / "overrides.json").read_text()) == plan.overrides
    assert (
        run_directory.create_run_directory(plan_of("trainer.use_cpu=true")).run_dir == plan.run_dir
    )  # it never started
    run_directory.set_status(plan.run_path, "stopped")
    with pytest.raises(KitError, match="unfinished") as refused:
        run_directory.create_run_directory(plan_of("trainer.use_cpu=true"))
    assert "kit resume" in refused.value.problems[0].fix and "--fresh" in refused.value.problems[0].fix
    assert (
        run_directory.create_run_directory(plan_of("trainer.use_cpu=true"), fresh=True).run_dir == plan.run_dir + "-2"
    )
    run_directory.set_status(plan.run_path, "done")
    assert run_directory.create_run_directory(plan_of("trainer.use_cpu=true"), fresh=True).run_dir.endswith("-3")
    with run_directory.lock_run_directory(plan.run_path):
        with pytest.raises(KitError, match="in use"), run_directory.lock_run_directory(plan.run_path):
            pass
    assert run_directory.process_holding_lock(plan.run_path) is None
    with pytest.raises(KitError, match="there is no run"):
        run_directory.find_run("nothing")
    with pytest.raises(KitError, match="is finished"):
        api.resume(plan.run_dir)


def system_answers(monkeypatch, number: int, refused) -> None:
    """Let flock() fail as another file system's does, where `refused` says so of (open mode, operation)."""
    flock = fcntl.flock

    def other(f, operation: int) -> None:
        descriptor = f if isinstance(f, int) else f.fileno()
        if refused(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE, operation):
            raise OSError(number, os.strerror(number))
        flock(f, operation)

    monkeypatch.setattr(fcntl, "flock", other)


def test_locks_of_other_file_systems(tmp_path, monkeypatch, capsys):
    """NFS gives an exclusive lock to a file that is open for writing only; some Lustre mounts have no locks."""
    with run_directory.lock_run_directory(tmp_path):
        assert run_directory.process_holding_lock(tmp_path) == os.getpid()
    with monkeypatch.context() as nfs:
        system_answers(nfs, errno.EBADF, lambda mode, kind: mode == os.O_RDONLY and kind & fcntl.LOCK_EX)
        assert run_directory.process_holding_lock(tmp_path) is None
        with run_directory.lock_run_directory(tmp_path):
            assert run_directory.process_holding_lock(tmp_path) == os.getpid()
    with monkeypatch.context() as none:
        system_answers(none, errno.ENOSYS, lambda mode, kind: True)
        with run_directory.lock_run_directory(tmp_path):
            assert run_directory.process_holding_lock(tmp_path) is None
    assert capsys.readouterr().err.count("has no locks") == 1


def test_a_run_that_another_process_has(plan_of):
    """A trial, or a rank that is started by hand, says so; what the other one says of the run stays."""
    run = run_directory.create_run_directory(plan_of("trainer.use_cpu=true")).run_path
    refused_beside(run, run_directory.LOCK, "kit.sweeps.trial", str(os.getpid()))
    refused_beside(run, run_directory.LOCK + ".rank0", "kit.worker")


def test_looking_at_a_lock_does_not_keep_a_run_from_it(tmp_path):
    with run_directory.lock_run_directory(tmp_path):
        pass
    with open(tmp_path / run_directory.LOCK) as look:
        assert run_directory.try_flock(look, fcntl.LOCK_SH)
        timer = threading.Timer(0.05, look.close)
        timer.start()
        with run_directory.lock_run_directory(tmp_path):
            timer.join()


def test_nohup_outlives_the_terminal():
    """SIGHUP asks for a checkpoint and an end, unless whoever started us wants it ignored."""
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, asked in ((signal.SIG_IGN, 0), (signal.SIG_DFL, 1)):
            signal.signal(signal.SIGHUP, handler)
            with supervise.StopRequests() as stop:
                os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requests == asked and signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


TABLE = "0, GPU-aa11, H100, 81559, 9.0\n1, GPU-ab22, H100, 81559, 9.0\n2, GPU-cc33, GB10, [N/A], 12.1\n"
LISTING = """\
GPU 0: H100 (UUID: GPU-aa11)
  MIG 3g.40gb     Device  0: (UUID: MIG-11)
  MIG 1g.10gb+me  Device  1: (UUID: MIG-22)
GPU 1: H100 (UUID: GPU-ab22)
"""


@pytest.mark.parametrize(
    "visible, names",
    [
        (None, ["H100", "H100", "GB10"]), ("1,0", ["H100", "H100"]), ("GPU-cc33", ["GB10"]),
        ("GPU-cc", ["GB10"]), ("GPU-a", []),  # as much of it as is clear
        ("1,7,0", ["H100"]), ("-1", []),  # what stands behind one that is not there is not seen
        ("MIG-22", ["H100 1g.10gb+me"]), ("MIG-11", ["H100 3g.40gb"]),
    ],
)  # fmt: skip
def test_which_gpus_are_seen(visible, names):
    found = hardware.parse_visible_gpus(TABLE, LISTING, visible)
    assert [g.name for g in found] == names and all(g.capability for g in found)
    assert all(g.memory_gb < 41 for g in found if "g." in g.name) and all(g.memory_gb > 0 for g in found)


def test_resume_changes_only_what_may_change(plan_of):
    plan = plan_of("trainer.use_cpu=true", "trainer.max_steps=10", "launch=local", "global_batch_size=8")
    more = api.override_plan(plan, ["trainer.max_steps=20", "trainer.per_device_train_batch_size=4"])
    assert (more.trainer["max_steps"], more.trainer["gradient_accumulation_steps"]) == (20, 2)
    assert (more.hash, more.run_dir, more.name) == (plan.hash, plan.run_dir, plan.name)
    with pytest.raises(KitError, match="cannot change within a run"):
        api.override_plan(plan, ["peft.r=2"])
    with pytest.raises(KitError, match="did you mean|no key|unknown key"):
        api.override_plan(plan, ["trainer.max_step=2"])
    with pytest.raises(KitError, match="global batch would change"):
        api.override_plan(plan, ["global_batch_size=16"])


TWO = ("trainer.use_cpu=true", "launch.num_gpus=2", "trainer.per_device_train_batch_size=2")


@pytest.mark.parametrize(
    ("begun", "resumed", "divided"),
    [  # per device, accumulation, processes
        ((*TWO, "global_batch_size=8"), ["launch.num_gpus=1"], (2, 4, 1)),
        ((*TWO, "trainer.gradient_accumulation_steps=2"), ["launch.num_gpus=1"], (2, 4, 1)),
        ((*TWO, "trainer.gradient_accumulation_steps=2"), ["launch.num_gpus=4"], (2, 1, 4)),
        ((*TWO, "trainer.gradient_accumulation_steps=2"), ["launch.num_nodes=2"], (2, 1, 4)),
        ((*TWO, "trainer.gradient_accumulation_steps=2"), ["trainer.per_device_train_batch_size=4"], (4, 1, 2)),
        ((*TWO, "trainer.gradient_accumulation_steps=2"), ["launch.num_gpus=1", "global_batch_size=8"], (2, 4, 1)),
        ((*TWO, "trainer.gradient_accumulation_steps=2", "deepspeed=zero2"), ["launch.num_gpus=1"], (2, 4, 1)),
        (("trainer.use_cpu=true", "launch=local"), ["trainer.per_device_train_batch_size=4"], (4, 2, 1)),
        (("trainer.use_cpu=true", "launch=local"), ["launch=torchrun", "launch.num_gpus=2",
         "trainer.per_device_train_batch_size=1"], (1, 4, 2)),
    ],
)  # fmt: skip
def test_a_resume_divides_the_same_global_batch_anew(plan_of, begun, resumed, divided):
    """And the resume after it, with the first number of processes, finds the first division again."""
    plan = plan_of(*begun)
    new = api.override_plan(plan, resumed)
    trainer = new.trainer
    assert (
        trainer["per_device_train_batch_size"], trainer["gradient_accumulation_steps"], new.world_size
    ) == divided  # fmt: skip
    assert new.global_batch_size == plan.global_batch_size == math.prod(divided)
    assert not new.deepspeed or new.deepspeed["gradient_accumulation_steps"] == divided[1]
    if resumed == ["launch.num_gpus=1"]:
        back = api.override_plan(new, ["launch.num_gpus=2"])
        assert (back.world_size, back.trainer["gradient_accumulation_steps"]) == (2, 2)


@pytest.mark.parametrize(
    ("resumed", "says", "fix"),
    [
        (["launch.num_gpus=3"], "8 does not divide by 2 rows x 3", "a number of processes that divides 8 rows; or a "
         "new run from its weights: kit train global_batch_size=12 peft.init_from=X"),
        (["launch.num_gpus=8"], "8 does not divide by 2 rows x 8", "trainer.per_device_train_batch_size=1; or a new"),
        (["launch.num_gpus=1", "trainer.gradient_accumulation_steps=2"], "from 8 to 4 rows", "leave both out"),
        (["trainer.gradient_accumulation_steps=4"], "from 8 to 16 rows", "leave both out"),
    ],
)  # fmt: skip
def test_a_resume_refuses_another_global_batch(plan_of, resumed, says, fix):
    plan = plan_of(*TWO, "trainer.gradient_accumulation_steps=2")
    with pytest.raises(KitError, match=says) as refused:
        api.override_plan(plan, resumed, "kit train global_batch_size=8 peft.init_from=X")
    assert refused.value.problems[0].fix.startswith(fix)


def test_plans_survive_the_border(plan_of, tmp_path):
    """plan.json read back is the same plan: only JSON types, nothing lost."""
    from kit.schema.run_plan import load_plan

    plan = plan_of("deepspeed=zero3", "peft.target_modules=[q_proj]", "trainer.lr_scheduler_kwargs={num_cycles: 1}")
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert load_plan(tmp_path) == plan
    (tmp_path / "plan.json").write_text(plan.to_json()[:-20])
    with pytest.raises(KitError, match="is not a plan"):
        load_plan(tmp_path)
    start = time.monotonic()
    assert command.free_port() != command.free_port() and time.monotonic() - start < 1
