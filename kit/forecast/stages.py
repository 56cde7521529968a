"""The model states of one GPU under data parallelism, each ZeRO stage and a layer split: the ZeRO paper's picture.

Rajbhandari et al. 2020, figure 1: 7.5 billion parameters on 64 GPUs take 120, 31.4, 16.6 and 1.9 GB. Activations and
buffers are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kit.forecast.memory import Sizes, Step, forecast_memory

STATES = ("base weights", "adapter", "gradients", "optimizer")  # terms of forecast_memory
STAGES = {0: "data parallel", 1: "ZeRO-1", 2: "ZeRO-2", 3: "ZeRO-3"}


@dataclass(frozen=True)
class Stage:
    """A way to spread a run over GPUs: bytes on each by term, and the part of all GPUs' speed that it can reach."""

    name: str
    bytes: float
    parts: dict[str, float]
    speed: float = 1.0


def stage_picture(step: Step, base: Sizes) -> list[Stage]:
    """Return the model states of one GPU under plain data parallelism, ZeRO-1, 2, 3 and a layer split.

    All in mixed precision as DeepSpeed keeps it, with float32 master weights and nothing offloaded. A layer split
    (`device_map="auto"`) has as little on each GPU as ZeRO-3, but one GPU computes while the others wait.
    """
    zero = {k: v for k, v in _zero_of(step).items() if not k.startswith("offload_")}
    found = [
        _stage(name, replace(step, deepspeed={"zero_optimization": zero | {"stage": stage}}), base)
        for stage, name in STAGES.items()
    ]
    parts = {name: size / step.processes for name, size in found[0].parts.items()}
    return [*found, Stage("layer split", sum(parts.values()), parts, 1 / step.processes)]


def states_of_run(step: Step, base: Sizes) -> Stage:
    """Return the model states of one GPU as the run itself keeps them."""
    return _stage("this run", step, base)


def _stage(name: str, step: Step, base: Sizes) -> Stage:
    parts = {term.name: term.bytes for term in forecast_memory(step, base).terms if term.name in STATES}
    return Stage(name, sum(parts.values()), parts)


def _zero_of(step: Step) -> dict[str, object]:
    return dict((step.deepspeed or {}).get("zero_optimization") or {})
