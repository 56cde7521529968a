"""`kit eject`: the plain TRL script, ds_config.json and run.sh that do what a plan does, without the kit.

Every plan key is written out, or the plan is refused with the reason: nothing is dropped in silence. What the script
does stands beside it in kit/training/run.py, kit/training/model.py and kit/data/load.py.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from kit import rundir
from kit.config import dataset as data_files
from kit.config import fields, template, trackers
from kit.config.schema import Dataset, RunPlan, load_plan
from kit.config.tokenizer import find_template
from kit.errors import DONE, KitError, Problem
from kit.hub import NO_TELEMETRY
from kit.launchers.command import rank_environment

SCRIPT, JSON, START, TEMPLATE = "train.py", "ds_config.json", "run.sh", "chat_template.jinja"
MOST, WIDTH = 80, 119
FORMATS = data_files.FORMATS


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="kit eject", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("words", nargs="*", metavar="RUN | run.yaml | key=value | OUT_DIR")
    parser.add_argument("--config-dir", "-cd", help="a folder with groups and recipes of your own")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    a = parser.parse_intermixed_args(argv)
    plan, out = read(a.words, a.config_dir)
    for line in write(plan, out, a.overwrite):
        print(line)
    return DONE


def read(words: list[str], config_dir: str | None = None) -> tuple[RunPlan, Path]:
    """The plan and the folder to write: from overrides, or from the run directory that the first bare word names."""
    from kit import api

    composed = [w for w in words if "=" in w or w.startswith("~") or w.endswith((".yaml", ".yml"))]
    bare = [w for w in words if w not in composed]
    if composed:
        plan = api.compose(*composed, config_dir=config_dir)
    elif bare:
        plan = load_plan(rundir.find_run(bare.pop(0)))
    else:
        raise KitError(
            "nothing to eject", "command line", "kit eject recipe=NAME [OUT_DIR], or kit eject RUN [OUT_DIR]"
        )
    if len(bare) > 1:
        raise KitError(f"one folder to write is enough, not {', '.join(bare)}", "command line", "name one")
    return plan, Path(bare[0] if bare else f"{plan.name}-trl")


def write(plan: RunPlan, out: Path, overwrite: bool = False) -> list[str]:
    """Write the files of a plan into `out`; returns what to print. KitError where the plan cannot be ejected."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise KitError(f"{out} is not an empty folder", "OUT_DIR", "name another one, or --overwrite")
    refuse(plan)
    text = script(plan)
    out.mkdir(parents=True, exist_ok=True)
    (out / SCRIPT).write_text(text, encoding="utf-8")
    notes = []
    if plan.deepspeed:
        ds, notes = deepspeed_json(plan)
        (out / JSON).write_text(json.dumps(ds, indent=2) + "\n", encoding="utf-8")
    if plan.tokenizer.chat_template:
        shutil.copyfile(find_template(plan.tokenizer.chat_template), out / TEMPLATE)
    (out / START).write_text(run_sh(plan, out), encoding="utf-8")
    (out / START).chmod(0o755)
    if plan.prompts:
        notes.append("prompts are asked by kit generate, after training: they are not in the script")
    written = ", ".join(f.name for f in sorted(out.iterdir()) if f.name in (SCRIPT, JSON, START, TEMPLATE))
    lines = len(text.splitlines())
    return [f"ejected   {rundir.shown(out)}: {written} ({lines} lines of Python)", *(f"note      {n}" for n in notes)]


def refuse(plan: RunPlan) -> None:
    """KitError with everything that a plain script of this length cannot do."""
    problems = []
    if plan.launch.script:
        fix = "call SFTTrainer with your hooks yourself: eject without it, then add them"
        problems.append(Problem("a script of yours starts the kit's worker with its own hooks", "launch.script", fix))
    if start := plan.init_from:
        if start.weights is None:
            problems.append(Problem(f"{start.path} is not here", "peft.init_from", "fetch it, then eject again"))
        elif not start.weights.endswith(".safetensors"):
            problems.append(Problem("the run starts from a pickle", "peft.init_from", "convert it to safetensors"))
        elif not (Path(start.path) / start.weights).is_file():
            problems.append(Problem(f"{start.path} is gone", "peft.init_from", "put the adapter back"))
        if plan.zero_stage == 3:
            said = "PEFT cannot load an adapter into weights that ZeRO-3 has sharded"
            problems.append(Problem(said, "peft.init_from", "deepspeed=zero2, or train with the kit"))
    d = plan.dataset
    if d.streaming and d.test_size:
        problems.append(Problem("a stream cannot be split", "dataset.test_size", "dataset.eval_path=FILE"))
    if d.streaming and d.format == "auto":
        problems.append(Problem("the columns of the stream are not known", "dataset.format", "dataset.format=text"))
    odd = (
        [n for n in template.columns_of(d.template) if not re.fullmatch(r"[^\W\d][^.\[\]]*", n)] if d.template else []
    )
    if odd:
        said = f"str.format cannot read the columns {', '.join(odd)}"
        problems.append(Problem(said, "dataset.template", "rename the columns in the data"))
    if problems:
        raise KitError(problems)


def script(plan: RunPlan) -> str:
    """train.py. One argument to a line; several where it would not fit into MOST lines. KitError where neither does."""
    for packed in (False, True):
        text = "\n".join(lines_of(plan, packed)) + "\n"
        if (count := len(text.splitlines())) <= MOST:
            return text
    raise KitError(
        f"the script would have {count} lines, more than {MOST}: nobody would read it",
        "eject",
        "leave out what the run does not need; kit diff shows what differs from a recipe",
    )


def lines_of(plan: RunPlan, packed: bool) -> list[str]:
    """The script from top to bottom, as kit/training/run.py goes."""
    cpu, ds, full = plan.trainer["use_cpu"], plan.deepspeed, plan.peft is None
    head = [f'"""{plan.name} as a plain TRL script, by `kit eject`. Start it with ./{START}, in this folder.', ""]
    head += [
        "It trains what the plan trains. The kit's guards are not in it: complete-or-absent saves with a manifest,"
    ]
    head += ["a stop at a signal that can be resumed, and an end where the loss is no longer finite.", '"""', ""]
    body: list[str] = []
    if ds and cpu:
        body += ["# zero.Init asks DeepSpeed for the number of processes, on a CPU before the trainer has set it up."]
        body += ['deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)', ""]
    if ds:
        body.append("# Before the model, and kept: from_pretrained looks for the DeepSpeed config that this holds.")
    body += call("args = SFTConfig(", arguments(plan), packed)
    body += ["set_seed(args.seed)  # the adapter is drawn before the trainer seeds", ""]
    body += [*tokenizer_lines(plan), "", *data_lines(plan, packed), "", *model_lines(plan, packed)]
    given = ["model=model", "args=args", "train_dataset=train"]
    given += ["eval_dataset=validation"] if held_out(plan.dataset) else []
    given += ["processing_class=tokenizer"]
    if not full:
        body += call(*adapter(plan), packed)
        given.append("peft_config=adapter")
    body += call("trainer = SFTTrainer(", given, packed)
    if plan.init_from:
        path = str(Path(plan.init_from.path) / str(plan.init_from.weights))
        body += call("set_peft_model_state_dict(", ["trainer.model", f"load_file({literal(path)})"], packed)
    if plan.quantization and (plan.precision == "float32" or (plan.precision == "float16" and not ds)):
        body += ["for parameter in trainer.model.parameters():  # TRL makes the adapter of a quantized base bfloat16"]
        body += ["    if parameter.requires_grad:", "        parameter.data = parameter.data.float()"]
    body += ["trainer.train()", "trainer.save_state()"]
    if full:
        body.append("trainer.model.config.use_cache = True  # off for training only")
    body.append(f"trainer.save_model({literal(rundir.MODEL if full else rundir.ADAPTER)})")
    if parts := held_out(plan.dataset):
        held = "trainer.evaluate(test)" if parts == 2 else "trainer.evaluate()"
        body += [f"metrics = {held}", "if args.process_index == 0:", "    print(metrics)"]
    return [*head, *imports("\n".join(body)), "", *body]


def imports(body: str) -> list[str]:
    """What the body uses, in isort's order."""
    plain = [f"import {m}" for m in ("deepspeed", "torch") if re.search(rf"\b{m}\.", body)]
    found = []
    for module, names in (
        ("bitsandbytes.nn", ["Linear4bit", "Linear8bitLt"]),
        ("datasets", ["load_dataset"]),
        ("peft", ["LoraConfig", "get_peft_config", "set_peft_model_state_dict"]),
        ("safetensors.torch", ["load_file"]),
        (
            "transformers",
            ["AddedToken", "AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "BitsAndBytesConfig", "set_seed"],
        ),
        ("trl", ["SFTConfig", "SFTTrainer"]),
    ):
        if used := [n for n in names if re.search(rf"\b{n}\b", body)]:
            found.append(f"from {module} import {', '.join(used)}")
    standard = ["from glob import glob"] if "glob(" in body else []
    standard += ["from pathlib import Path"] if "Path(" in body else []
    return [*standard, *([""] if standard else []), *plain, *found]


def arguments(plan: RunPlan) -> list[str]:
    """SFTConfig's arguments: what differs from its defaults, and what the kit's worker adds."""
    values = changed("SFTConfig", {k: v for k, v in plan.trainer.items() if k != "model_init_kwargs"})
    values["logging_nan_inf_filter"] = False
    more: dict[str, Any] = {"output_dir": rundir.CHECKPOINTS}
    if trackers.names(plan.trainer.get("report_to")):
        more |= {k: v for k, v in {"run_name": plan.run_path.name, "project": plan.name}.items() if k not in values}
    if plan.deepspeed:
        more["deepspeed"] = JSON
    if plan.fsdp:
        more |= {"fsdp": True, "fsdp_config": plan.fsdp}
    if plan.trainer["use_cpu"] and plan.world_size > 1:
        more["ddp_backend"] = "gloo"
    return keywords({**more, **values})


def changed(table: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values that are not the library's defaults."""
    known = fields.tables()[table]
    return {k: v for k, v in values.items() if k not in known or not same(v, known[k].get("default"))}


def same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def tokenizer_lines(plan: RunPlan) -> list[str]:
    t, m = plan.tokenizer, plan.model
    given = {"revision": t.revision or (m.revision if t.name_or_path is None else None)}
    given["trust_remote_code"] = m.trust_remote_code or None
    lines = call(
        "tokenizer = AutoTokenizer.from_pretrained(", [literal(t.name_or_path or m.name_or_path), *said(given)]
    )
    if t.added_tokens:
        lines += [f"tokens = {literal(t.added_tokens)}"]
        lines += ["tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in tokens], True)"]
    for key in ("pad_token", "eos_token", "bos_token"):
        if token := getattr(t, key):
            lines.append(f"tokenizer.{key} = {literal(token)}")
    if not t.pad_token:
        lines.append('assert tokenizer.pad_token, "name a token to pad with: TRL would take the end token"')
    if t.chat_template:
        lines.append(f'tokenizer.chat_template = Path("{TEMPLATE}").read_text(encoding="utf-8")')
    return [*lines, 'tokenizer.padding_side = "right"']


def held_out(d: Dataset) -> int:
    """How many parts are held out: none, one that serves for both, or validation and test."""
    if d.eval_path or d.eval_split:
        return 1
    return 0 if not d.test_size else (1 if d.validation_size is None else 2)


def data_lines(plan: RunPlan, packed: bool) -> list[str]:
    """Reading, splitting and writing the rows, as kit/data/load.py does."""
    d = plan.dataset
    functions, shape = columns_of(d)
    lines = loading("rows", d, d.path, d.split, shape, packed)
    names = ["train", "validation", "test"][: 1 + held_out(d)]
    if d.eval_path or d.eval_split:
        lines[0] = lines[0].replace("rows =", "train =", 1)
        lines += loading(
            "validation", d, d.eval_path or d.path, d.split if d.eval_path else str(d.eval_split), shape, packed
        )
    elif d.test_size:
        out = d.test_size + (d.validation_size or 0)
        lines.append(f"parts = rows.train_test_split(test_size={out!r}, seed={d.seed})")
        if d.validation_size is None:
            lines.append('train, validation = parts["train"], parts["test"]')
        else:
            share = d.test_size / out if out < 1 else int(d.test_size)
            lines.append(f'rest = parts["test"].train_test_split(test_size={share!r}, seed={d.seed})')
            lines.append('train, validation, test = parts["train"], rest["train"], rest["test"]')
    else:
        lines[0] = lines[0].replace("rows =", "train =", 1)
    for name in names:
        limit = d.limit if name == "train" else d.eval_limit
        if d.template:
            lines.append(f"{name} = prepare({name})")
        if limit and d.streaming:
            lines.append(f"{name} = {name}.take({limit})")
        elif limit:
            lines.append(f"{name} = {name}.select(range(min({limit}, len({name}))))")
    if plan.world_size > 1:
        lines = ["with args.main_process_first():", *(f"    {line}" if line else "" for line in lines)]
    return ["", *functions, "", "", *lines] if functions else lines


def loading(name: str, d: Dataset, path: str, split: str, shape: str, packed: bool) -> list[str]:
    """`name = load_dataset(...)`, of a file, a folder or a Hub id, with the columns that training needs."""
    place = Path(path)
    suffix = place.suffix.lower()
    if place.is_dir() or suffix in data_files.SUFFIXES:
        files = [str(f) for f in data_files.find_files(path) or []] if place.exists() else [path]
        first = Path(files[0]).suffix.lower()
        kind = data_files.SUFFIXES[first]
        alike = place.is_dir() and not any(f.name.startswith(".") or f.suffix != first for f in map(Path, files))
        held = f"sorted(glob({literal(str(place / ('*' + first)))}))" if alike else literal(files)
        given = [literal(kind), f"data_files={held if len(files) > 1 else literal(files[0])}", 'split="train"']
        given += ['delimiter="\\t"'] if first == ".tsv" else []
    else:
        config, revision = (d.name, d.revision) if path == d.path else (None, None)
        given = [literal(path), *([literal(config)] if config else []), *said({"revision": revision, "split": split})]
    given += ["streaming=True"] if d.streaming else []
    if shape.startswith("."):
        return call(f"{name} = load_dataset(", given, packed, f"){shape}")
    lines = call(f"{name} = load_dataset(", given, packed)
    return [*lines, f"{name} = {shape}({name})"]


def columns_of(d: Dataset) -> tuple[list[str], str]:
    """Functions that the script needs for its columns, and what each part goes through when it is read."""
    if d.template:
        names = template.columns_of(d.template)
        return template_functions(d, names), f".select_columns({literal(names)})"
    rename = {theirs: ours for ours, theirs in d.columns.items() if theirs != ours}
    if d.format != "auto":
        wanted = {d.columns.get(c, c): c for c in FORMATS[d.format]}
        rename = {theirs: ours for theirs, ours in wanted.items() if theirs != ours}
        return [], f".select_columns({literal(list(wanted))})" + (
            f".rename_columns({literal(rename)})" if rename else ""
        )
    lines = ["def choose_columns(rows):"]
    if rename:
        clash = literal([ours for ours in rename.values() if ours not in rename])
        lines.append(f"    rows = rows.remove_columns([c for c in {clash} if c in rows.column_names])")
        lines.append(f"    rows = rows.rename_columns({literal(rename)})")
    lines.append(f"    known = {literal([list(c) for c in FORMATS.values()])}")
    lines.append("    return rows.select_columns(next(c for c in known if set(c) <= set(rows.column_names)))")
    return lines, "choose_columns"


def template_functions(d: Dataset, names: list[str]) -> list[str]:
    """`write`: one row in the format that is trained; `prepare`: a part without the rows that teach nothing."""
    lines = ["def write(row):", '    row = {name: "" if value is None else value for name, value in row.items()}']
    if template.format_of(d.template) == "messages":
        lines.append("    turns = [")
        for role in template.TURNS:
            if role in d.template:
                content = f"{literal(d.template[role])}.format(**row).strip()"
                lines.append(f'        {{"role": "{role}", "content": {content}}},')
        lines.append("    ]")
        if "system" in d.template:
            lines.append('    turns = [turn for turn in turns if turn["content"] or turn["role"] != "system"]')
        apart = d.format == "prompt_completion"
        made = '{"prompt": turns[:-1], "completion": turns[-1:]}' if apart else '{"messages": turns}'
        lines.append(f"    return {made}")
    else:
        items = [f"{literal(key)}: {literal(text)}.format(**row)" for key, text in d.template.items()]
        lines += [f"    {line}" for line in call("return {", items, end="}")]
    learned = [k for k in template.TRAINED if k in d.template]
    taught = sorted({n for k in learned for _, n in template.parts(k, d.template[k]) if n})
    keep = f".filter(lambda row: any(row[c] is not None and str(row[c]).strip() for c in {literal(taught)}))"
    lines += ["", "", "def prepare(rows):"]
    if taught:
        lines.append(f"    rows = rows{keep}")
    return [*lines, f"    return rows.map(write, remove_columns={literal(names)})"]


def model_lines(plan: RunPlan, packed: bool) -> list[str]:
    m, quantization = plan.model, plan.quantization
    common = {"revision": m.revision, "trust_remote_code": m.trust_remote_code or None}
    kwargs = {**(plan.trainer.get("model_init_kwargs") or {}), "attn_implementation": m.attn_implementation}
    given = [f"dtype=torch.{m.dtype}", *said(kwargs)]
    lines = []
    if m.random_init:
        lines += call("config = AutoConfig.from_pretrained(", [literal(m.name_or_path), *said(common)], packed)
        only = {"trust_remote_code": m.trust_remote_code or None}
        lines += call("model = AutoModelForCausalLM.from_config(", ["config", *said(only), *given], packed)
    else:
        if quantization:
            held = {k: v for k, v in quantization.items() if k != "quant_method" and v is not None}
            lines += call("bits = BitsAndBytesConfig(", keywords(changed("BitsAndBytesConfig", held)), packed)
            given.append("quantization_config=bits")
        start = [literal(m.name_or_path), *said(common), "use_safetensors=True", *given]
        lines += call("model = AutoModelForCausalLM.from_pretrained(", start, packed)
    if quantization and quantization.get("load_in_4bit") and plan.trainer["use_cpu"]:
        lines += ["for module in model.modules():  # else an evaluation repacks the weights for a kernel of its own"]
        lines += ["    if isinstance(module, Linear4bit):", "        module.support_avx512bf16_for_cpu = False"]
    if quantization and quantization.get("load_in_8bit") and plan.deepspeed:
        lines += ["for module in model.modules():  # else DeepSpeed finds no scales when it loads a checkpoint"]
        lines += ["    if isinstance(module, Linear8bitLt):", "        module.init_8bit_state()"]
        lines += ["        module.weight.SCB = module.state.SCB"]
    if plan.tokenizer.added_tokens:
        lines += ["weight, needed = model.get_input_embeddings().weight, max(tokenizer.get_vocab().values()) + 1"]
        lines += ['if needed > getattr(weight, "ds_shape", weight.shape)[0]:']
        lines += ["    model.resize_token_embeddings(needed)"]
    return lines


def adapter(plan: RunPlan) -> tuple[str, list[str]]:
    """The PEFT config, as the opening of a call and its arguments."""
    values = dict(plan.peft or {})
    kind = str(values.pop("peft_type", "LORA")).upper()
    values = changed(kind, values)
    if kind == "LORA":
        return "adapter = LoraConfig(", keywords(values)
    return "adapter = get_peft_config(", [literal({"peft_type": kind, **values})]


def deepspeed_json(plan: RunPlan) -> tuple[dict[str, Any], list[str]]:
    """The plan's JSON, with the one switch that a plain trainer needs in order to save anything under ZeRO-3."""
    ds = json.loads(json.dumps(plan.deepspeed))
    gather = "stage3_gather_16bit_weights_on_model_save"
    if plan.zero_stage != 3 or ds["zero_optimization"].get(gather):
        return ds, []
    ds["zero_optimization"][gather] = True
    said = (
        f"{gather} is true: a plain trainer saves nothing under ZeRO-3 without it; the kit gathers the adapter alone"
    )
    return ds, [said]


def run_sh(plan: RunPlan, out: Path) -> str:
    """The environment and the command line with which `kit train` would start the ranks."""
    env = rank_environment(plan.model_copy(update={"run_dir": str(out.absolute())}))
    env = {k: v for k, v in env.items() if k not in ("PATH", "PYTHONUNBUFFERED", "TORCH_EXTENSIONS_DIR")}
    quiet = " ".join(f"{k}={shlex.quote(env.pop(k))}" for k in NO_TELEMETRY)
    port = str(plan.launch.master_port or '"${MASTER_PORT:-29500}"')
    where = f"--master_addr 127.0.0.1 --master_port {port}"
    count = plan.launch.num_gpus
    if plan.launch.launcher == "deepspeed":
        # An absent hostfile means this machine; the default is one that a cluster may have left in /job.
        command = f"deepspeed --num_gpus {count} --hostfile no-hostfile {where} --no_local_rank {SCRIPT}"
    elif plan.launch.launcher == "torchrun":
        command = f"torchrun --nnodes 1 --nproc_per_node {count} {where} {SCRIPT}"
    else:
        command = f"python {SCRIPT}"
        if plan.deepspeed:
            alone = "RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 LOCAL_SIZE=1"
            command = f"{alone} MASTER_ADDR=127.0.0.1 MASTER_PORT={port} {command}"
        if not plan.trainer["use_cpu"]:  # one process that sees several GPUs would be wrapped in DataParallel
            command = f'CUDA_VISIBLE_DEVICES="${{CUDA_VISIBLE_DEVICES:-0}}" {command}'
    exports = [f"export {k}={shlex.quote(v)}" for k, v in env.items()]
    return (
        "\n".join(["#!/bin/sh", "set -e", 'cd "$(dirname "$0")"', f"export {quiet}", *exports, f"exec {command}"])
        + "\n"
    )


# ---- Python as text ----


def said(values: dict[str, Any]) -> list[str]:
    return keywords({k: v for k, v in values.items() if v is not None})


def keywords(values: dict[str, Any]) -> list[str]:
    return [f"{k}={literal(v)}" for k, v in values.items()]


def literal(value: Any) -> str:
    """A plain value as Python source, with the quotes that formatters prefer."""
    if isinstance(value, str):
        plain = repr(value)
        return plain if '"' in value or "\\'" in plain else f'"{plain[1:-1]}"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    return repr(value)


def call(start: str, items: list[str], packed: bool = False, end: str = ")") -> list[str]:
    """`start item, item end`: in one line where it fits, else one item to a line, or as many as fit (`packed`)."""
    if len(whole := f"{start}{', '.join(items)}{end}") <= WIDTH - 4:  # 4: it may be indented
        return [whole]
    if not packed:
        return [start, *(f"    {item}," for item in items), end]
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + len(item) + 2 <= WIDTH:
            lines[-1] += f" {item},"
        else:
            lines.append(f"    {item},")
    return [start, *lines, f"{end}  # fmt: skip"]
