"""The verbs that work with what training left: merge, generate, eval; and convert, for other people's weights."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from kit.errors import DONE
from kit.system.terminal import progress_printer, read_prompts, silence_libraries, verb_parser


def merge_verb(argv: list[str]) -> int:
    parser = verb_parser("merge", "Fold a LoRA adapter into its base, shard by shard on the CPU.")
    parser.add_argument("source", help="a run directory, an adapter folder, or a Hub id in the cache")
    parser.add_argument("--base", help="the base model, for an adapter that the kit did not make")
    parser.add_argument("--revision")
    parser.add_argument("--out", help="where the merged model goes (RUN/merged)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the merged weights (the base's)"
    )
    parser.add_argument(
        "--onto", choices=["original", "dequantized"],
        help="for a run over a quantized base: the stored weights (default), or what quantizing left of them",
    )  # fmt: skip
    parser.add_argument(
        "--verify", choices=["auto", "logits", "tensors", "no"], default="auto", nargs="?", const="logits"
    )
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--no-fsync", action="store_true", help="leave flushing to the system")
    a = parse_or_submit(parser, "merge", argv)
    silence_libraries()
    from kit.merging import merge as merge_adapter
    from kit.merging.report import format_merge

    verify: bool | str = {"auto": True, "no": False}.get(a.verify, a.verify)
    source = resolve_run_name(a.source)
    result = merge_adapter(
        source, a.base, a.out, revision=a.revision, verify=verify, dtype=a.dtype, onto=a.onto,
        fsync=not a.no_fsync, overwrite=a.overwrite, progress=progress_printer("merging"),
    )  # fmt: skip
    print(format_merge(result))
    return DONE


def generate_verb(argv: list[str]) -> int:
    parser = verb_parser("generate", "The same prompts through base, adapter and merged model, side by side.")
    add_source_options(parser)
    parser.add_argument("--prompts", help="a file with one prompt per line, or - for standard input")
    parser.add_argument("--prompt", action="append", help="one prompt; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--system", help="a system message before every prompt")
    parser.add_argument("--raw", action="store_true", help="no chat template: the prompt as it is")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", help="samples.json goes here (RUN)")
    a = parse_or_submit(parser, "generate", argv)
    silence_libraries()
    from kit.evaluation.generate import format_samples
    from kit.evaluation.generate import generate as generate_samples

    prompts = list(a.prompt or [])
    if a.prompts:
        prompts += read_prompts(a.prompts)
    result = generate_samples(
        resolve_run_name(a.source), base=a.base, revision=a.revision, prompts=prompts or None, which=a.which,
        raw=a.raw, max_new_tokens=a.max_new_tokens, temperature=a.temperature, top_p=a.top_p, seed=a.seed,
        system=a.system, batch_size=a.batch_size, out=Path(a.out) if a.out else None,
    )  # fmt: skip
    print(format_samples(result["samples"]))
    if result.get("adapter_equals_merged") is not None:
        print(f"adapter and merged model agree token for token: {result['adapter_equals_merged']}")
    return DONE


def evaluate_verb(argv: list[str]) -> int:
    parser = verb_parser("eval", "Exact match, loss and perplexity on the held-out rows.")
    add_source_options(parser)
    parser.add_argument("--data", help="a file of rows instead of the run's held-out split")
    parser.add_argument("--limit", type=int, help="at most this many rows")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--few-shot", type=int, default=0, help="also the base with this many worked examples")
    parser.add_argument("--json", action="store_true")
    a = parse_or_submit(parser, "eval", argv)
    silence_libraries()
    from kit.evaluation.evaluate import evaluate as evaluate_models
    from kit.evaluation.evaluate import format_table

    result = evaluate_models(
        resolve_run_name(a.source), base=a.base, revision=a.revision, data=a.data, which=a.which, limit=a.limit,
        max_new_tokens=a.max_new_tokens, batch_size=a.batch_size, few_shot=a.few_shot,
    )  # fmt: skip
    print(json.dumps(result, indent=1, ensure_ascii=False) if a.json else format_table(result))
    return DONE


def convert_verb(argv: list[str]) -> int:
    parser = verb_parser(
        "convert", "Meta's own Llama checkpoint, or pickled weights, to safetensors, in bounded memory."
    )
    parser.add_argument(
        "source",
        metavar="DIR",
        help="the folder of params.json and consolidated.*.pth, or of pytorch_model*.bin",
    )
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (as stored)")
    parser.add_argument(
        "--shard-gb", type=float, default=4.0, help="the largest file, in 1e9 bytes (4); pickles stay one file each"
    )
    parser.add_argument("--max-position-embeddings", type=int, help="the context length (that of the generation)")
    parser.add_argument("--verify-checklist", action="store_true", help="first compare md5s with checklist.chk")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that this verb made")
    parser.add_argument("--no-fsync", action="store_true", help="do not wait for the disk")
    a = parser.parse_args(argv)
    silence_libraries()
    from kit.converting import convert as convert_checkpoint
    from kit.storage import run_directory

    report = convert_checkpoint(
        a.source, a.out, dtype=a.dtype, shard_gb=a.shard_gb, max_position_embeddings=a.max_position_embeddings,
        verify_checklist=a.verify_checklist, overwrite=a.overwrite, fsync=not a.no_fsync,
        progress=progress_printer("converting"),
    )  # fmt: skip
    size = f"{report['parameters'] / 1e9:.2f} B parameters, {report['dtype']}, {report['bytes'] / 1e9:.1f} GB"
    print(f"converted {run_directory.path_from_here(report['out'])} ({size}, {report['seconds']:.1f} s)")
    for note in report["notes"]:
        print(f"note      {note}")
    return DONE


def add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a run directory, an adapter folder, a model folder, or a Hub id in the cache")
    parser.add_argument("--base", help="the base model of an adapter folder")
    parser.add_argument("--revision")
    parser.add_argument("--which", action="append", choices=["base", "adapter", "merged", "model"])


def parse_or_submit(parser: argparse.ArgumentParser, verb: str, argv: list[str]) -> argparse.Namespace:
    """The parsed words; with launch=slurm among them the rest is submitted as a batch job, and this process ends."""
    parser.epilog = (
        "launch=slurm [launch.slurm.KEY=VALUE ...] makes it a SLURM job, with the run's own launch.slurm.* below; "
        "--follow then shows its log."
    )
    words = [a for a in argv if a.startswith(("launch=", "launch."))]
    a = parser.parse_args([x for x in argv if x not in words and not (words and x == "--follow")])
    if words:
        from kit.launchers import slurm

        rest = [x for x in argv if x not in words and x != "--follow"]
        sys.exit(slurm.submit_verb(verb, resolve_run_name(a.source), rest, words, "--follow" in argv))
    return a


def resolve_run_name(name: str) -> str:
    """A run may be named without its folder, as `kit resume` takes it."""
    from kit.storage import run_directory

    inside = Path("runs") / name
    return str(inside) if not Path(name).exists() and (inside / run_directory.PLAN).is_file() else name
