"""The kit, TRL as it comes and TRL as an expert sets it up, side by side on this machine's GPUs: the same work.

    python tests/benchmarks/gpu.py                                                       (all that these GPUs allow)
    python tests/benchmarks/gpu.py --works full,documents --shapes 8b --budget 380       (a part; again: it goes on)
    python tests/benchmarks/gpu.py --cpu --shape tiny --works full --arms kit,trl --steps 3 --out /tmp/x.json
    python tests/benchmarks/gpu.py --cpu --tiny --shapes gemma9b,gpt2xl --out /tmp/x.json            (rehearsals)

LoRA r16 on all linears, bf16, 8,192 tokens on each GPU and optimizer step, random weights of real shapes in local
safetensors. Works:
full          full rows, 2 x 4096 (GPT-2: 8 x 1024)
documents     lognormal(5.6, 0.9) tokens, clipped at 4096: TRL as it comes pads 8 of them, the others pack
zero2, zero3  full rows on two GPUs, figures of one; full_zero3 and full_zero3_offload train all weights
learning      200 steps on text with structure, a seed for each series: losses of the kit beside TRL's
sweep         16,384 tokens a step by every level of activation checkpointing and number of rows, beside "auto"
Arms: `trl` is SFTTrainer with its own defaults and an "auto" DeepSpeed JSON; `expert` switches checkpointing off,
takes cuDNN's attention for full rows, packs documents with flash-attn (where installed) or torch's `varlen_attn`, and
Liger's layer kernels where installed; `expert_bf16` also casts the adapters; `limit` is the card's own, GEMMs and
attention alone (card_limit.py); `kit` says nothing of memory, attention or batches. A sweep's are `auto`, and `typed`
or single options like off/2. One process for each arm and series, series in turns (a, b, c, then c, b, a). The first 3
steps are not timed; "to step 1" is from the command to the end of the first, DeepSpeed's operators built. Exit code 1
where an arm failed; out of memory is an answer. JSON after each arm; an arm that it holds is not run again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import learning  # noqa: E402
import speed_table  # noqa: E402
from arms import (  # noqa: E402
    LORA,
    SHAPES,
    TINY,
    Results,
    call,
    environment,
    failure,
    make_base_apart,
    make_data,
    make_documents,
    run_kit,
    run_trl,
    shape_fields,
)
from training import as_it_comes  # noqa: E402

from kit.config.memory_choice import AUTO_ROWS, LEVELS, divisors  # noqa: E402
from kit.forecast.memory import forecast_memory, measure_sizes  # noqa: E402
from kit.forecast.of_plan import step_of_plan  # noqa: E402
from kit.inspection.model import inspect_model  # noqa: E402
from kit.launchers import ops  # noqa: E402
from kit.schema.run_plan import load_plan  # noqa: E402
from kit.system.hardware import list_gpus  # noqa: E402

OTHERS = ("mistral7b", "qwen7b", "gemma9b", "gpt2xl")
SINGLE = ("limit", "trl", "expert", "expert_bf16", "kit")
TOKENS, LONGEST = 8192, 4096  # of a step on one GPU; of a row
BASE_BYTES = 25e9  # room on the disk that a base may take
Found = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What is trained: on how many GPUs, under which DeepSpeed group, an adapter or all weights, rows or documents."""

    arms: tuple[str, ...]
    shapes: tuple[str, ...] = ("8b",)
    gpus: int = 1
    deepspeed: str = "none"
    all_weights: bool = False
    documents: bool = False


WORKS = {
    "full": Work(SINGLE, ("8b", *OTHERS)),
    "documents": Work(SINGLE, ("8b", *OTHERS), documents=True),
    "zero2": Work(("trl", "kit"), gpus=2, deepspeed="zero2"),
    "zero3": Work(("trl", "kit"), gpus=2, deepspeed="zero3"),
    "full_zero3": Work(("trl", "kit"), gpus=2, deepspeed="zero3", all_weights=True),
    "full_zero3_offload": Work(("trl", "kit"), gpus=2, deepspeed="zero3_offload", all_weights=True),
    "learning": Work(("trl", "kit"), ("0b6",)),
    "sweep": Work((), ("8b", *OTHERS)),
}


@dataclass(frozen=True)
class Job:
    """One process: an arm of a work on a base."""

    name: str
    shape: str
    arm: str
    series: int

    @property
    def key(self) -> str:
        return f"{self.name} {self.shape} {self.arm} {self.series}"

    @property
    def work(self) -> Work:
        return WORKS[self.name]

    @property
    def tiny(self) -> bool:
        return self.shape.startswith("tiny")

    @property
    def length(self) -> int:
        if self.tiny:
            return 64 if self.name == "learning" else 128
        if self.name == "learning":
            return 512
        fields = shape_fields(self.shape)
        return min(LONGEST, fields.get("max_position_embeddings") or fields["n_positions"])

    @property
    def rows(self) -> int:
        """Rows of one GPU in an optimizer step."""
        rows = 2 if self.tiny else TOKENS // self.length
        return 2 * rows if self.name == "sweep" else rows


class Bench:
    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.folder = a, Path(a.work_dir)
        self.results = Results(self.folder, Path(a.out), a.budget, [Path(f) for f in a.earlier])
        self.env = environment(a.cpu)
        self.env["TORCH_EXTENSIONS_DIR"] = str(ops.extensions_dir())  # one set of operators for both

    def steps(self, job: Job) -> int:
        return self.a.learning_steps if job.name == "learning" else self.a.steps

    def make_base(self, job: Job) -> Path:
        """A base's folder; others are removed first where the disk has no room for it. They are made again in time."""
        learned = job.name == "learning"
        base = self.folder / f"base-{job.shape}{'-learned' * learned}"
        if not (base / "done").exists():
            others = [] if job.tiny else sorted(self.folder.glob("base-*"))
            while others and shutil.disk_usage(self.folder).free < BASE_BYTES:
                shutil.rmtree(others.pop())
            start = time.time()
            make_base_apart(base, job.shape, "cpu" if self.a.cpu else "cuda", self.a.pretrain_steps * learned)
            print(f"{base.name}: {time.time() - start:.1f} s", flush=True)
        return base

    def make_data(self, job: Job) -> Path:
        steps, rows = self.steps(job), job.rows * job.work.gpus
        kind = "documents" if job.work.documents else "learning" if job.name == "learning" else "rows"
        path = self.folder / f"{kind}-{job.length}-{rows}-{steps}.jsonl"
        if path.exists():
            return path
        if kind == "documents":
            make_documents(path, 40 * steps * rows, job.length)
        elif kind == "learning":
            learning.make_structured(path, 2 * steps * rows, job.length + 8)
        else:
            make_data(path, 2 * steps * rows, job.length + 8)
        return path

    def trainer(self, job: Job) -> Found:
        """What every arm is told."""
        rate = 1e-5 if job.work.all_weights else 2e-4
        seed = 41 + job.series if job.name == "learning" else 42
        return dict(max_length=job.length, max_steps=self.steps(job), logging_steps=1, seed=seed, report_to="none",
                    save_strategy="no", learning_rate=rate, lr_scheduler_type="cosine")  # fmt: skip

    def run(self, job: Job) -> Found:
        base, data = self.make_base(job), self.make_data(job)
        folder = self.folder / job.key.replace(" ", "-").replace("/", "-")
        env = dict(self.env)
        if not self.a.cpu and job.work.gpus == 1:
            env["CUDA_VISIBLE_DEVICES"] = str(self.a.gpu)
        if "offload" in job.work.deepspeed:
            ops.build_missing_ops(["cpu_adam"], 900, print, env)
        if job.arm == "limit":
            row = self.run_limit(job, base, folder, env)
        elif job.arm in ("trl", "expert", "expert_bf16"):
            settings = self.trl_settings(job, base, data)
            row = run_trl(folder, settings, job.work.gpus, job.work.deepspeed != "none", env, self.a.limit)
            row |= {"settings": settings}
        else:
            overrides = self.kit_overrides(job, base, data)
            row, run = run_kit(folder, overrides, env, self.a.limit)
            row |= {"settings": overrides, **(read_plan(run) if run else {})}
        if row.get("out_of_memory"):  # an answer, not to be asked again
            row.pop("failed")
        if "failed" not in row:  # full fine-tuning leaves a whole model
            shutil.rmtree(folder)
        return row

    def run_limit(self, job: Job, base: Path, folder: Path, env: dict[str, str]) -> Found:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        lengths, draw = [job.length] * job.rows, random.Random(0)
        if job.work.documents:
            total, lengths = sum(lengths), []
            while sum(lengths) < total:
                drawn = int(draw.lognormvariate(5.6, 0.9) * job.length / LONGEST)
                lengths.append(max(2, min(job.length, drawn, total - sum(lengths))))
        settings, out, log = folder / "settings.json", folder / "out.json", folder / "log"
        asked = {"lengths": lengths, "packed": job.work.documents, "times": 1 if job.tiny else 10}
        settings.write_text(json.dumps(asked))
        argv = [sys.executable, str(HERE / "card_limit.py"), str(base), str(settings), str(out)]
        code, seconds = call(argv, env, log, self.a.limit)
        if code or not out.exists():
            return failure(code, log)
        return json.loads(out.read_text()) | {"all_seconds": round(seconds, 1)}

    def trl_settings(self, job: Job, base: Path, data: Path) -> Found:
        """Settings of trl_plain.py."""
        work, a = job.work, self.a
        sft = {**self.trainer(job), "per_device_train_batch_size": job.rows, "gradient_accumulation_steps": 1}
        engine = "none" if work.deepspeed == "none" else work.deepspeed
        sft |= as_it_comes(engine, self.folder, a.cpu)
        init: Found = {"dtype": "float32"} if a.cpu else {}
        expert: Found = {}
        if job.arm == "trl" and work.documents:
            sft["per_device_train_batch_size"] = 8  # its default
        if job.arm != "trl":
            sft["gradient_checkpointing"] = False
            sft["use_liger_kernel"] = not a.cpu and importlib.util.find_spec("liger_kernel") is not None
            expert = {"bf16_adapters": job.arm == "expert_bf16", "cudnn": not a.cpu and not work.documents}
            if work.documents:
                sft["packing"] = True
                if not a.cpu:
                    flash = importlib.util.find_spec("flash_attn") is not None
                    init["attn_implementation"] = "flash_attention_2" if flash else "varlen"
                    expert["varlen"] = not flash
        if init:
            sft["model_init_kwargs"] = init
        return {
            "sft": sft, "expert": expert, "model": str(base), "peft": None if work.all_weights else LORA,
            "tokenizer": str(base / "tokenizer"), "data": str(data), "save": False,
        }  # fmt: skip

    def kit_overrides(self, job: Job, base: Path, data: Path) -> list[str]:
        """What `kit train` is told; in a sweep, but for its `auto`, also how memory is used."""
        work, trainer = job.work, self.trainer(job)
        words = [
            f"model.name_or_path={base}",
            f"tokenizer.name_or_path={base}/tokenizer",
            f"dataset.path={data}",
            f"global_batch_size={job.rows * work.gpus}",
        ]
        words += [f"deepspeed={work.deepspeed}", f"launch.num_gpus={work.gpus}"]
        words += ["launch=local" if work.deepspeed == "none" else "launch=deepspeed"]
        words += ["peft=none"] if work.all_weights else [f"peft.{k}={v}" for k, v in LORA.items()]
        if work.documents:
            trainer["packing"] = True
        if self.a.cpu:
            words += ["model.dtype=float32"]
            trainer |= dict(use_cpu=True, bf16=False, fp16=False)
        if "/" in job.arm:
            level, _, rows = job.arm.partition("/")
            kwargs = dict(named_levels())[level]
            trainer |= dict(per_device_train_batch_size=rows, activation_checkpointing=kwargs is not None)
            if kwargs:
                pairs = ",".join(f"{k}:{str(v).lower()}" for k, v in kwargs.items())
                trainer["activation_checkpointing_kwargs"] = f"{{{pairs}}}"
        return words + [f"trainer.{k}={v}" for k, v in trainer.items()]

    def too_large(self, job: Job) -> str | None:
        """The key of an option of the same level with fewer rows that ran out of memory, where there is one."""
        level, _, rows = job.arm.partition("/")
        for fewer in divisors(job.rows):
            key = Job(job.name, job.shape, f"{level}/{fewer}", job.series).key
            if rows and fewer < int(rows) and self.results.rows.get(key, {}).get("out_of_memory"):
                return key
        return None


def named_levels() -> list[tuple[str, Found | None]]:
    """The kit's levels of activation checkpointing, each with a name."""
    names = []
    for kwargs, _ in LEVELS:
        words = "".join(f"{k}{v}" if v is not True else k for k, v in (kwargs or {}).items())
        names.append((words or ("off" if kwargs is None else "all"), kwargs))
    return names


def read_plan(run: Path) -> Found:
    """What the kit chose, and what it foretells of memory in GiB of torch's allocator."""
    plan = load_plan(run)
    trainer = plan.trainer
    base, _ = inspect_model(plan.model, here=False)
    sizes = measure_sizes(base.text, plan.peft)
    memory = sizes and forecast_memory(step_of_plan(plan, trainer), sizes)
    keys = ("activation_checkpointing", "activation_checkpointing_kwargs", "per_device_train_batch_size",
            "gradient_accumulation_steps", "packing")  # fmt: skip
    return {
        "chosen": {key: trainer[key] for key in keys if key in trainer},
        "attention": plan.model.attn_implementation,
        "forecast_gb": memory and round(memory.peak / 2**30, 2),
        "options_that_ran_out_of_memory": plan.memory.chosen if plan.memory else 0,
    }


def jobs_of(name: str, shape: str, series: int, arms: Sequence[str] | None) -> list[Job]:
    """The arms of a work in one series, in turns. Where none are asked for, an expert's only on the main shape."""
    if name == "sweep":
        counts = [rows for rows in divisors(Job(name, shape, "", series).rows) if rows <= AUTO_ROWS]
        own = ["auto", *(f"{level}/{rows}" for rows in counts for level, _ in named_levels())]  # fewer rows first
        names = [arm for arm in own if arms is None or arm in arms or ("/" in arm and "typed" in arms)]
        return [Job(name, shape, arm, series) for arm in names]
    names = [arm for arm in WORKS[name].arms if arms is None or arm in arms]
    if arms is None and shape.removeprefix(TINY) not in ("8b", "tiny"):
        names = [arm for arm in names if not arm.startswith("expert")]
    return [Job(name, shape, arm, series) for arm in (names if series % 2 else reversed(names))]


def planned(a: argparse.Namespace, gpus: int) -> list[Job]:
    """All jobs that were asked for, base after base; works that need more GPUs are named and left out."""
    for name in a.works:
        if not a.cpu and WORKS[name].gpus > gpus:
            print(f"{name} needs {WORKS[name].gpus} GPUs, {gpus} here")
    works = [name for name in a.works if a.cpu or WORKS[name].gpus <= gpus]
    shapes = a.shapes or dict.fromkeys(shape for name in works for shape in WORKS[name].shapes)
    jobs = []
    for shape in shapes:
        for name in works:
            if not a.shapes and shape not in WORKS[name].shapes:
                continue
            series = {"learning": a.seeds, "sweep": 1}.get(name, a.series)
            own = TINY + shape if a.tiny and shape != "tiny" else shape
            jobs += [job for n in range(1, series + 1) for job in jobs_of(name, own, n, a.arms)]
    return jobs


def default_out(gpus: Sequence[str]) -> Path:
    """results/<date>-<card>-speed.json"""
    words = re.findall(r"[a-z0-9]+", gpus[0].lower().replace("nvidia", "")) if gpus else ["cpu"]
    card = words[0] + (f"x{len(gpus)}" if len(gpus) > 1 else "")
    return HERE / "results" / f"{time.strftime('%F')}-{card}-speed.json"


def arguments() -> argparse.Namespace:
    def names(known: Sequence[str]) -> Any:
        def split(text: str) -> list[str]:
            for word in text.split(","):
                if word.partition("/")[0] not in known:
                    raise argparse.ArgumentTypeError(f"{word} is none of {', '.join(known)}")
            return text.split(",")

        return split

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", "--work", type=names(list(WORKS)), default=list(WORKS))
    levels = [level for level, _ in named_levels()]
    parser.add_argument("--arms", type=names([*SINGLE, "auto", "typed", *levels]), help="all; an expert's on 8b alone")
    parser.add_argument("--shapes", "--shape", type=names(list(SHAPES)), help="those of each work")
    parser.add_argument("--series", type=int, default=2, help="how often each arm runs")
    parser.add_argument("--seeds", type=int, default=3, help="of `learning`")
    parser.add_argument("--steps", type=int, default=11, help="3 of them are not timed")
    parser.add_argument("--learning-steps", type=int, default=200)
    parser.add_argument("--pretrain-steps", type=int, default=300, help="of the base of `learning`")
    parser.add_argument("--gpu", type=int, default=0, help="for works of one GPU")
    parser.add_argument("--budget", type=float, default=1e9, help="start no further arm after so many seconds")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one arm")
    parser.add_argument("--work-dir", default="/tmp/kit-bench-gpu")
    parser.add_argument("--out", type=Path, help="results/<date>-<card>-speed.json")
    parser.add_argument("--earlier", nargs="*", default=[], help="JSON of earlier calls, whose arms are done")
    parser.add_argument("--tiny", action="store_true", help="small models of the same architectures")
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args()


def main() -> int:
    a = arguments()
    gpus = [] if a.cpu else [gpu.name for gpu in list_gpus()]
    if not (gpus or a.cpu):
        sys.exit("there is no GPU here: --cpu --tiny rehearses")
    a.out = a.out or default_out(gpus)
    bench = Bench(a)
    for job in planned(a, len(gpus)):
        if bench.results.done(job.key):
            continue
        smaller = bench.too_large(job)
        try:
            row = {"out_of_memory": True, "not_run": f"{smaller} did not fit"} if smaller else bench.run(job)
        except Exception as error:  # the next arm still runs, and the file says what happened
            row = {"failed": f"{type(error).__name__}: {error}"}
        bench.results.keep(job.key, row)
        bench.results.json["summary"] = speed_table.summarize(bench.results.rows)
        bench.results.write()
    print(speed_table.table(speed_table.summarize(bench.results.rows)))
    return int(any("failed" in row for row in bench.results.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
