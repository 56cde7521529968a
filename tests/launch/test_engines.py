"""The same description under every engine: losses, gradient norms and adapters agree with one process.

Real launches: `kit train` (deepspeed, torchrun, plain), `deepspeed --module kit.worker` typed by hand, and one
`deepspeed` launch that runs several engines in sequence.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_rows

from kit.inspection.trainable import abbreviate
from kit.schema.run_plan import load_plan
from kit.storage import run_directory
from kit.storage.checkpoints import WHOLE_OPTIMIZER
from launch import harness

pytestmark = pytest.mark.launch
LOSS, NORM, BF16 = 1e-5, 1e-5, 2e-2  # absolute, relative, absolute; measured here: at most 1.5e-6 in float32
IN_ONE_LAUNCH = ["zero1", "zero3", "zero3_checkpointed", "zero3_modules", "zero2_offload"]
ENGINES = [*IN_ONE_LAUNCH, "zero2", "zero3_offload", "ddp"]
REHEARSED = ["zero2", "zero3", "zero2_offload", "full"]
LEAVES = "deepspeed.zero_optimization.leaf_module.classes"
ZERO = "deepspeed.zero_optimization"
CUT_UP = (
    f"{ZERO}.stage3_param_persistence_threshold=100"  # low-rank matrices too; they are in flight after an evaluation
)


@pytest.fixture(scope="session")
def work(tmp_path_factory, ops_dir) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def alone(work, base, chat) -> Path:
    """One process, no engine: what all others are compared with."""
    done = harness.kit("train", *harness.overrides(base, chat, work / "alone", "launch=local"), cwd=work)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return harness.the_run(work / "alone")


@pytest.fixture(scope="session")
def zero2(work, base, chat) -> Path:
    two = ("deepspeed=zero2", "launch=deepspeed", "launch.num_gpus=2")
    env = harness.watched(work / "connections.txt")
    done = harness.kit("train", *harness.overrides(base, chat, work / "zero2", *two), cwd=work, **env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = harness.the_run(work / "zero2")
    harness.assert_nothing_left(run)
    return run


@pytest.fixture(scope="session")
def zero3_offload(work, base, chat) -> Path:
    """Typed by hand with a frozen plan: `deepspeed --num_gpus 2 --module kit.worker plan.json`."""
    two = ("deepspeed=zero3_offload", "launch=deepspeed", "launch.num_gpus=2")
    made = harness.kit("compose", *harness.overrides(base, chat, work / "zero3_offload", *two), cwd=work)
    assert made.returncode == 0, made.stdout + made.stderr
    plan = json.loads(made.stdout)["plan"]
    argv = ["deepspeed", "--num_gpus", "2", "--master_port", port(), "--module", "kit.worker", plan]
    done = harness.finish(harness.start(argv, work, DS_ACCELERATOR="cpu"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return harness.the_run(work / "zero3_offload")


@pytest.fixture(scope="session")
def ddp(work, base, chat) -> Path:
    two = ("launch=torchrun", "launch.num_gpus=2")
    done = harness.kit("train", *harness.overrides(base, chat, work / "ddp", *two), cwd=work)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return harness.the_run(work / "ddp")


@pytest.fixture(scope="session")
def sequence(work, base, chat) -> Path:
    """Engines, ZeRO-3 with and without leaf modules, zero2 in bf16, full fine-tuning under zero3, in one launch.

    And some of them with a rehearsal before the first step.
    """
    folder = work / "sequence"
    plans = []
    cases = {
        **{name: [f"deepspeed={name}"] for name in ("zero1", "zero3", "zero2_offload")},
        "zero3_checkpointed": ["deepspeed=zero3", "trainer.gradient_checkpointing=true", CUT_UP],
        "zero3_modules": ["deepspeed=zero3", f"{LEAVES}=[]", CUT_UP, f"{ZERO}.stage3_max_live_parameters=1"],
        "bf16": ["deepspeed=zero2", "trainer.bf16=true"],
        "full": ["deepspeed=zero3", "peft=none", "trainer.learning_rate=1.0e-3"],
    }
    cases |= {f"{name}_rehearsed": [*cases.get(name, ["deepspeed=zero2"]), "rehearsal=true"] for name in REHEARSED}
    for name, more in cases.items():
        args = [*more, "launch=deepspeed", "launch.num_gpus=2"]
        made = harness.kit("compose", *harness.overrides(base, chat, folder / name, *args), cwd=work)
        assert made.returncode == 0, made.stdout + made.stderr
        plans.append(json.loads(made.stdout)["plan"])
    script = str(harness.ROOT / "tests" / "launch" / "sequence.py")
    argv = ["deepspeed", "--num_gpus", "2", "--no_local_rank", "--master_port", port(), script, *plans]
    done = harness.finish(harness.start(argv, work, DS_ACCELERATOR="cpu"), 400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("the longest batch: ") == len(REHEARSED)
    return folder


@pytest.fixture(scope="session")
def faults(work, base, chat) -> Path:
    """One process with a planted fault each, and bf16 and full fine-tuning in one process, in one start."""
    folder = work / "faults"
    data = [json.loads(line) for line in chat.read_text().splitlines()]
    # One rank's rows are others.
    half = [data[(i + 4) % len(data)] if i % 8 >= 4 else row for i, row in enumerate(data)]
    swapped = write_rows(work / "swapped.jsonl", half)
    cases = {
        "swapped": [f"dataset.path={swapped}"],
        "accumulation": ["global_batch_size=10"],
        "clipping": ["trainer.max_grad_norm=0"],
        "bf16": ["trainer.bf16=true"],
        "full": ["peft=none", "trainer.learning_rate=1.0e-3"],
    }
    plans = []
    for name, more in cases.items():
        made = harness.kit("compose", *harness.overrides(base, chat, folder / name, "launch=local", *more), cwd=work)
        assert made.returncode == 0, made.stdout + made.stderr
        plans.append(json.loads(made.stdout)["plan"])
    script = str(harness.ROOT / "tests" / "launch" / "sequence.py")
    done = harness.finish(harness.start([sys.executable, script, *plans], work))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture
def run_of(request):
    """The run directory of an engine by name; engines that share a launch share it here."""

    def find(engine: str) -> Path:
        if engine in IN_ONE_LAUNCH:
            return harness.the_run(request.getfixturevalue("sequence") / engine)
        return request.getfixturevalue(engine)

    return find


def port() -> str:
    from kit.launchers.command import free_port

    return str(free_port())


def apart(a: dict[int, float], b: dict[int, float], relative: bool = False) -> float:
    assert a.keys() == b.keys() and len(a) == 20, (sorted(a), sorted(b))
    return max(abs(a[s] - b[s]) / (abs(b[s]) if relative else 1) for s in a)


@pytest.mark.parametrize("engine", ENGINES)
def test_equals_one_process(engine, run_of, alone):
    """Losses of every step within 1e-5, gradient norms within 1e-5 relative, the same evaluation and best step."""
    run = run_of(engine)
    assert apart(harness.rows(run), harness.rows(alone)) <= LOSS
    assert apart(harness.rows(run, "grad_norm"), harness.rows(alone, "grad_norm"), relative=True) <= NORM
    ours, theirs = harness.rows(run, "eval_loss"), harness.rows(alone, "eval_loss")
    assert {s: pytest.approx(v, abs=LOSS) for s, v in theirs.items()} == ours
    best = [Path(json.loads((r / "metrics.json").read_text())["best_model_checkpoint"]).name for r in (run, alone)]
    assert best[0] == best[1]


@pytest.mark.parametrize("engine", ["alone", *ENGINES, "full", "bf16"])
def test_what_check_tells_is_what_happens(engine, run_of, request, alone):
    """Batch, steps and trained numbers: those of the plan, of the banner, and of what was trained and saved."""
    if engine in ("full", "bf16"):
        run = harness.the_run(request.getfixturevalue("sequence") / engine)
    else:
        run = alone if engine == "alone" else run_of(engine)
    plan = load_plan(run)
    shared = engine in (*IN_ONE_LAUNCH, "full", "bf16")  # one start for several runs: none has a log of its own
    banner = None if shared else (run / "logs" / "rank0.log").read_text()
    steps, trains = (next(n for n in plan.notes if word in n) for word in (" rows of an epoch", "trains "))
    assert banner is None or f"steps     {steps}" in banner
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["step"] == int(steps.split()[0]) == 20
    assert json.loads((run / "data.json").read_text())["splits"]["train"]["rows"] == int(steps.split()[5])
    saved = run / ("model" if engine == "full" else "adapter") / "manifest.json"
    trained = json.loads(saved.read_text())["parameters"]
    assert banner is None or f"{trained:,} trained" in banner
    assert abbreviate(trained) in trains
    seen = round(metrics["train_samples_per_second"] * metrics["train_runtime"] / metrics["step"])
    assert banner is None or f"batch     {seen} rows per step" in banner
    assert seen == plan.global_batch_size


@pytest.mark.parametrize("fault", ["swapped", "accumulation", "clipping"])
def test_a_planted_fault_exceeds_the_tolerance(fault, faults, alone):
    run = harness.the_run(faults / fault)
    if fault == "clipping":  # the norm is the same before clipping; what follows from it is not
        assert apart(harness.rows(run), harness.rows(alone)) > 10 * LOSS
    else:
        assert apart(harness.rows(run), harness.rows(alone)) > 10 * LOSS
        assert apart(harness.rows(run, "grad_norm"), harness.rows(alone, "grad_norm"), relative=True) > 10 * NORM


def test_bf16_agrees_within_its_digits(sequence, faults, alone):
    two, one = harness.the_run(sequence / "bf16"), harness.the_run(faults / "bf16")
    assert apart(harness.rows(two), harness.rows(one)) <= BF16
    assert apart(harness.rows(two), harness.rows(alone)) > LOSS  # it really was another precision


@pytest.mark.parametrize("engine", ["alone", *ENGINES])
def test_adapter_is_complete(engine, run_of, request, alone):
    """Every expected tensor, 2-D, finite, B not zero, equal to one process; manifests clean; no pickle beside it."""
    import torch
    from safetensors.torch import load_file

    from kit.storage import manifest

    run = alone if engine == "alone" else run_of(engine)
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    modules = (
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
    )
    names = {
        f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"
        for layer in range(2) for module in modules.split() for side in "AB"
    }  # fmt: skip
    assert set(tensors) == names
    reference = load_file(alone / "adapter" / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        assert tensor.dim() == 2 and torch.isfinite(tensor).all() and tensor.abs().max() > 0, name
        torch.testing.assert_close(tensor, reference[name], atol=2e-4, rtol=0)
    assert manifest.verify_folder(run / "adapter") == []
    checkpoints = sorted((run / "checkpoints").glob("checkpoint-*"))
    assert [c.name for c in checkpoints] == ["checkpoint-10", "checkpoint-20"]
    assert all(manifest.verify_folder(c) == [] for c in checkpoints)
    assert not list((run / "adapter").glob("*.bin"))
    assert harness.status(run)["state"] == "done"


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_merged_logits_equal_base_plus_adapter(engine, run_of):
    from kit.merging import merge

    report = merge(run_of(engine), overwrite=True, verify="logits")
    assert report["method"] == "streaming"
    assert report["verification"]["logits"]["max_difference"] < 1e-4, report["verification"]


@pytest.mark.parametrize("name", REHEARSED)
def test_a_rehearsal_leaves_no_trace(name, run_of, sequence):
    """Losses, norms, weights and optimizer states are those of the run without it, bit for bit."""
    from safetensors.torch import load_file

    without = harness.the_run(sequence / name) if name == "full" else run_of(name)
    rehearsed = harness.the_run(sequence / f"{name}_rehearsed")
    for key in ("loss", "grad_norm", "eval_loss", "num_tokens", "mean_token_accuracy"):
        assert harness.rows(rehearsed, key) == harness.rows(without, key), key
    saved = "model/model.safetensors" if name == "full" else "adapter/adapter_model.safetensors"
    assert (rehearsed / saved).read_bytes() == (without / saved).read_bytes()
    files = [sorted(str(p.relative_to(run)) for p in run.glob("checkpoints/**/*")) for run in (without, rehearsed)]
    assert files[0] == files[1]
    states = [file for file in files[0] if file.endswith(WHOLE_OPTIMIZER)]
    assert len(states) == (0 if name == "full" else 2)
    for file in states:  # by value: safetensors writes its metadata in any order
        one, other = (load_file(run / file) for run in (rehearsed, without))
        assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one), file


def test_a_rank_out_of_memory_in_the_trial_step(work, base, chat, alone):
    """All ranks end before the first step and start anew with fewer rows; the steps are those of the other engines."""
    runs, script = work / "memory", f"launch.script={harness.ROOT / 'tests/launch/out_of_memory.py'}"
    two = ("deepspeed=zero2", "launch=deepspeed", "launch.num_gpus=2", "rehearsal=true", script, "trainer.max_steps=3",
           "trainer.per_device_train_batch_size=auto", "trainer.eval_strategy=no",
           "trainer.load_best_model_at_end=false")  # fmt: skip
    made = harness.kit("compose", *harness.overrides(base, chat, runs, *two), cwd=work)
    plan = load_plan(json.loads(made.stdout)["plan"])
    first = plan.memory.options[0]
    assert (first.per_device_train_batch_size, first.gradient_accumulation_steps) == (4, 1), plan.memory
    # Beside its weights a tiny model's rows are nothing, so that no option would need less.
    second = first.model_copy(update={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4})
    run_directory.write_plan(
        plan.model_copy(update={"memory": plan.memory.model_copy(update={"options": [first, second]})})
    )
    launch = (
        "import sys; from kit.launchers.supervise import launch; from kit.schema.run_plan import load_plan; "
        "sys.exit(launch(load_plan(sys.argv[1])))"
    )
    done = harness.finish(harness.start([sys.executable, "-c", launch, str(plan.run_path)], work), 300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = done.stdout + done.stderr
    assert "out of memory in the trial step; next: activation checkpointing off, 1 row x 4 accumulation steps" in said
    assert said.count("the longest batch: ") == 1  # the first start did not come so far
    harness.assert_nothing_left(plan.run_path)
    kept = load_plan(plan.run_path)
    assert kept.memory.chosen == 1 and kept.hash == plan.hash
    assert kept.deepspeed["gradient_accumulation_steps"] == kept.trainer["gradient_accumulation_steps"] == 4
    losses, begun = harness.rows(plan.run_path), harness.rows(alone)
    assert len(losses) == 3 and abs(losses[1] - begun[1]) <= LOSS and harness.status(plan.run_path)["state"] == "done"


def test_full_fine_tuning_under_zero3(sequence, faults, base, alone):
    """The saved model loads, equals one process, and its config differs from the base's in nothing."""
    import torch
    from transformers import AutoModelForCausalLM

    two, one = harness.the_run(sequence / "full"), harness.the_run(faults / "full")
    assert apart(harness.rows(two), harness.rows(one)) <= LOSS
    models = [AutoModelForCausalLM.from_pretrained(run / "model") for run in (two, one)]
    for (name, a), (_, b) in zip(*(m.named_parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0, msg=name)
    before, after = (json.loads((f / "config.json").read_text()) for f in (base, two / "model"))
    assert {k: v for k, v in after.items() if before.get(k) != v} == {}
    assert before.keys() - after.keys() == set()


def test_zero3_gathers_whole_decoder_layers(sequence):
    """Filled in ds_config.json; DeepSpeed's hooks then run once a layer and direction, recomputed or not.

    The base has 2 layers; embedding, norm, head and the models around them are modules of their own, and a step is
    two micro-batches. The losses are compared above: a first layer whose zeros are reduced would show there.
    """
    filled = json.loads((harness.the_run(sequence / "zero3") / "ds_config.json").read_text())
    assert filled["zero_optimization"]["leaf_module"] == {"classes": ["LlamaDecoderLayer"]}
    hooks = {name: json.loads((harness.the_run(sequence / name) / "fetches.json").read_text())
             for name in ("zero3", "zero3_checkpointed", "zero3_modules", "full")}  # fmt: skip
    assert hooks["zero3"]["fetches"] == hooks["zero3_checkpointed"]["fetches"]
    assert hooks["zero3"]["fetches"] < hooks["zero3_modules"]["fetches"] / 8
    assert hooks["zero3"]["gathers"] < hooks["zero3_modules"]["gathers"]
    assert hooks["zero3"]["parameters"] < hooks["zero3_modules"]["parameters"]  # low-rank matrices stay whole
    assert hooks["zero3"]["late"] == hooks["zero3_checkpointed"]["late"] == 0 and hooks["zero3_modules"]["late"] > 10
    assert hooks["full"]["late"] <= 2  # the head, before anything else in each of two micro-batches
    assert hooks["full"]["fetches"] < hooks["zero3_modules"]["fetches"] / 8


def test_leaf_modules_that_the_model_lacks_are_refused(sequence, base):
    """Where DeepSpeed says a line in its log, and gathers each module by itself."""
    from transformers import AutoModelForCausalLM

    from kit.errors import KitError
    from kit.models.load import prepare_leaf_modules

    plan = load_plan(harness.the_run(sequence / "full"))
    model = AutoModelForCausalLM.from_pretrained(base)
    prepare_leaf_modules(model, plan)
    plan.deepspeed["zero_optimization"]["leaf_module"]["classes"] = ["MistralDecoderLayer"]
    with pytest.raises(KitError, match="MistralDecoderLayer") as refused:
        prepare_leaf_modules(model, plan)
    assert "[LlamaDecoderLayer]" in refused.value.problems[0].fix


def test_stopped_by_a_signal_on_one_rank_and_resumed(work, base, chat, zero2):
    """SIGTERM on rank 1 alone: exit 75 at one agreed step; `kit resume` ends bit-equal to a run never stopped."""
    runs = work / "stopped"
    script = f"launch.script={harness.ROOT / 'tests/launch/hooks.py'}"
    args = harness.overrides(base, chat, runs, "deepspeed=zero2", "launch=deepspeed", "launch.num_gpus=2", script)
    done = harness.kit("train", *args, cwd=work, KIT_TEST_SIGNAL="12")
    assert done.returncode == 75, done.stdout[-3000:] + done.stderr[-3000:]
    run = harness.the_run(runs)
    harness.assert_nothing_left(run)
    step = harness.status(run)["step"]
    assert 13 <= step <= 14 and (run / "checkpoints" / f"checkpoint-{step}" / "manifest.json").exists()
    assert "kit resume" in done.stderr

    again = harness.kit("train", *args, cwd=work)  # the same command again does not start over, nor beside it
    assert again.returncode == 2 and "kit resume" in again.stderr and "--fresh" in again.stderr
    refused = harness.kit("resume", str(run), "peft.r=8", "launch.num_gpus=1", cwd=work)
    assert refused.returncode == 2 and "peft.r" in refused.stderr

    done = harness.kit("resume", str(run), cwd=work)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"resuming from checkpoint-{step}" in done.stderr
    assert harness.rows(run) == harness.rows(zero2)
    for file in ("adapter/adapter_model.safetensors",):
        assert (run / file).read_bytes() == (zero2 / file).read_bytes()


def test_typed_by_hand_with_overrides_and_stopped_by_its_launcher(work, base, chat):
    """`deepspeed --module kit.worker OVERRIDES`; ending that command alone leaves no rank, but a checkpoint."""
    runs = work / "hand"
    args = harness.overrides(base, chat, runs, "deepspeed=zero2", "launch.num_gpus=2", "trainer.max_steps=100000")
    process = harness.start([str(harness.ROOT / "launch/deepspeed.sh"), "2", *args], work, DS_ACCELERATOR="cpu")
    harness.wait_for(
        lambda: any(len(f.read_text().splitlines()) >= 3 for f in runs.glob("*/metrics.jsonl")), 150, process
    )
    run = harness.the_run(runs)
    assert json.loads((run / "plan.json").read_text())["world_size"] == 2
    process.terminate()  # the runner has no handler: it dies at once and says nothing to its ranks
    process.communicate(timeout=60)
    harness.assert_nothing_left(run, 60)
    assert harness.status(run)["state"] == "stopped"
    from kit.storage import manifest

    assert manifest.newest_complete_checkpoint(run / "checkpoints").path


def test_ctrl_c_saves_and_resumes_bit_equal(work, base, chat, alone):
    """SIGINT to `kit train` in one process: 75, no process left, and the resumed run equals the uninterrupted one."""
    runs = work / "interrupted"
    slow = "trainer.dataloader_num_workers=0"
    args = harness.overrides(base, chat, runs, "launch=local", slow)
    process = harness.start([sys.executable, "-m", "kit", "train", *args], work)
    harness.wait_for(
        lambda: any(len(f.read_text().splitlines()) >= 3 for f in runs.glob("*/metrics.jsonl")), 100, process
    )
    process.send_signal(2)
    done = harness.finish(process, 60)
    run = harness.the_run(runs)
    harness.assert_nothing_left(run)
    assert done.returncode == 75, done.stdout[-2000:] + done.stderr[-2000:]
    done = harness.kit("resume", str(run), cwd=work)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert harness.rows(run) == harness.rows(alone)
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (alone / name).read_bytes()


def test_stopped_before_training_leaves_nothing(work, base, chat):
    runs = work / "early"
    args = harness.overrides(base, chat, runs, "deepspeed=zero2", "launch=deepspeed", "launch.num_gpus=2")
    process = harness.start([sys.executable, "-m", "kit", "train", *args], work)
    harness.wait_for(lambda: list(runs.glob("*/launch.json")), 60, process)
    process.terminate()
    done = harness.finish(process, 60)
    assert done.returncode not in (0, 75), done
    harness.assert_nothing_left(harness.the_run(runs))


def test_one_directory_one_run(work, base, chat, alone):
    """A finished run again takes a suffix; a directory that is being used is refused."""
    import fcntl

    args = harness.overrides(base, chat, work / "alone", "launch=local")
    with open(alone / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = harness.kit("train", *args, cwd=work)
    assert done.returncode == 2 and "in use" in done.stderr
    made = harness.kit("compose", *args, cwd=work)
    other = Path(json.loads(made.stdout)["plan"]).parent
    assert other.name == f"{alone.name}-2"
    shutil.rmtree(other)


def test_the_world_must_be_the_plans(work, base, chat):
    """A plan for two processes started as one is refused before any weight is loaded."""
    args = harness.overrides(base, chat, work / "world", "launch=torchrun", "launch.num_gpus=2")
    made = harness.kit("compose", *args, cwd=work)
    plan = json.loads(made.stdout)["plan"]
    done = harness.finish(harness.start([sys.executable, "-m", "kit.worker", plan], work))
    assert done.returncode == 2 and "2 processes" in done.stderr, done.stderr


def test_torchrun_script_says_what_is_wrong(work, base, chat):
    """launch/torchrun.sh: overrides are composed once, and both ranks leave with the refusal."""
    args = harness.overrides(base, chat, work / "wrong", "trainer.lerning_rate=1")
    done = harness.finish(harness.start([str(harness.ROOT / "launch/torchrun.sh"), "2", *args], work))
    assert done.returncode != 0 and "did you mean trainer.learning_rate" in done.stderr, done.stderr[-2000:]


def test_hydra_multirun_and_flags(work, base, chat):
    """Hydra's own flags on `kit train`: -m runs each point in a directory of its own, --cfg shows, --info informs."""
    stock = harness.overrides(base, chat, work / "sweep", "launch=local", "trainer.max_steps=2",
                              "trainer.eval_strategy=no", "trainer.load_best_model_at_end=false",
                              "name=point")  # fmt: skip
    done = harness.kit("train", "-m", *stock, "peft.r=2,4", cwd=work)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    ranks = sorted(json.loads(p.read_text())["peft"]["r"] for p in (work / "sweep").glob("*/*/plan.json"))
    assert ranks == [2, 4]
    shown = harness.kit("train", *stock, "--cfg", "job", "--resolve", cwd=work)
    assert shown.returncode == 0 and "max_steps: 2" in shown.stdout
    for flags in (["--info", "searchpath"], ["--hydra-help"], ["--help"]):
        assert harness.kit("train", *flags, cwd=work).returncode == 0
    folder = work / "conf" / "recipe"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\npeft:\n  lora_dropout: 0.25\n")
    shown = harness.kit("train", "--config-dir", str(work / "conf"), "recipe=mine", *stock, "--cfg", "job", cwd=work)
    assert shown.returncode == 0 and "lora_dropout: 0.25" in shown.stdout, shown.stderr
    wrong = harness.kit("train", *stock, "deepspeed=zero9", "--cfg", "job", cwd=work)
    assert wrong.returncode == 2


def test_signature_of_the_deepspeed_command():
    """The options that kit.launchers.command uses exist."""
    out = subprocess.run(
        [sys.executable, "-m", "deepspeed.launcher.runner", "--help"], capture_output=True, text=True, timeout=120
    )
    used = "--num_gpus --master_port --master_addr --hostfile --no_local_rank --module --log_level"
    for flag in used.split():
        assert flag in out.stdout, flag


def test_no_process_of_a_run_reaches_another_machine(zero2, work):
    """`kit train` with its launcher and two ranks, then merge and generate; the Hub is not switched off in them.

    tests/test_trackers.py shows that the same watch notes an attempt.
    """
    env = harness.watched(work / "connections.txt")
    done = harness.kit("merge", str(zero2), "--out", str(work / "merged"), cwd=work, **env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    asked = ["--prompt", "the doctor", "--max-new-tokens", "4", "--out", str(work / "samples.json")]
    done = harness.kit("generate", str(zero2), *asked, cwd=work, **env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    attempts = work / "connections.txt"
    assert not attempts.exists(), attempts.read_text()
