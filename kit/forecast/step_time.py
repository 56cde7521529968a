"""What an optimizer step computes and moves, and how long it takes: a range, for no two runs are as efficient."""

from __future__ import annotations

from dataclasses import dataclass

from kit.forecast.activations import sizes
from kit.forecast.hosts import HOST_GB_S, PCIE_GB_S, Host
from kit.forecast.memory import DTYPE_BYTES, Sizes, Step, weights_bytes

# The share of a card's dense TFLOP/s that a step's executed operations reach, at a hidden size of 4,096 and more;
# smaller matmuls reach less in proportion. H200, the kit as it comes: 0.47 at 4,096, 0.25 at 2,048, 0.14 at 1,600.
EFFICIENCY, FULL_WIDTH = 0.47, 4096
SLOWEST, FASTEST = 0.6, 1.15  # of it: what is between those figures and others
LINK_SHARE = 0.7  # of a link's one direction that NCCL reaches with large messages
ADAM_BYTES = 30  # that DeepSpeed's CPU Adam moves in host memory for each parameter
PETAFLOP_DAY = 1e15 * 86400


@dataclass(frozen=True)
class StepTime:
    """An optimizer step of one GPU.

    model_flops: without what is computed again; executed_flops: with it. Seconds: the fewest and the most.
    """

    tokens: int
    model_flops: float
    executed_flops: float
    link_bytes: float
    link_seconds: float
    host_seconds: float
    fastest: float
    slowest: float

    def utilization(self, host: Host) -> tuple[float, float]:
        """Return the lowest and highest MFU, model operations over the card's own."""
        return tuple(self.model_flops / seconds / (host.tflops * 1e12) for seconds in (self.slowest, self.fastest))  # type: ignore[return-value]


def active_linears(base: Sizes) -> float:
    """Return the parameters of matrices that one token passes through: of experts, those that it is sent to."""
    s = sizes(base.text)
    if not s["k"]:
        return base.linears
    expert = 3 * s["h"] * s["m"] * base.layers
    # transformers keeps all experts of a layer in one parameter, which is no linear module; some have modules.
    others = base.linears - s["E"] * expert
    return (others if others > 0 else base.linears) + s["k"] * expert


def count_flops(step: Step, base: Sizes, row_tokens: int) -> tuple[float, float]:
    """Return the operations of a micro-step, without and with recomputation.

    A matrix costs 2 a parameter and token forward and 4 backward; a frozen one 2, for its own gradient is not needed.
    Attention is causal: half of 4 x layers x width x length forward, twice that backward, frozen or not. Selective
    checkpointing repeats what costs time without operations. torch's checkpoint stops before a layer's last matmul,
    which nothing trained needs in full fine-tuning.
    """
    s, tokens = sizes(base.text), step.tokens
    layers, head = active_linears(base), s["h"] * int(base.text.get("vocab_size") or 0)
    attention = 2 * base.layers * (s["v"] or s["q"]) * row_tokens
    forward, adapter = 2 * (layers + head), 2 * base.trained if step.peft else 0
    model = forward * (2 if step.peft else 3) + 3 * adapter + 3 * attention
    again = 0.0
    kwargs = step.checkpointing
    if kwargs is not None and not kwargs.get("selective"):
        last = 0 if step.peft else 2 * base.layers * s["h"] * (s["k"] * s["m"] or s["i"])
        again = (2 * layers - last + adapter + attention) / int(kwargs.get("every_n_layers") or 1)
    return model * tokens, (model + again) * tokens


def forecast_time(step: Step, base: Sizes, host: Host, accumulation: int, row_tokens: int) -> StepTime:
    """Return the time of an optimizer step. row_tokens: of a row, or of the documents packed into it, on average."""
    model, executed = (accumulation * flops for flops in count_flops(step, base, row_tokens))
    width = min(1.0, sizes(base.text)["h"] / FULL_WIDTH)
    compute = executed / (host.rate * 1e12 * EFFICIENCY * width)
    weights, trained, number = weights_bytes(step, base)[0], base.trained, DTYPE_BYTES[step.precision]
    part, others = 1 / step.processes, 1 - 1 / step.processes
    moved = 2 * trained * number * others  # gradients are reduced, or reduced and gathered, once a step
    if step.stage == 3:  # weights are gathered for the forward and the backward pass; gradients reduced each time
        moved = (2 * weights + (0 if step.peft else trained * number)) * others * accumulation
    link = moved / (host.link_gb_s / 2 * 1e9 * LINK_SHARE)
    offload = 0.0
    if step.offloads("optimizer"):  # all processes of a host share its memory
        offload += ADAM_BYTES * trained / (HOST_GB_S * 1e9) + 2 * number * trained * part / (PCIE_GB_S * 1e9)
    if step.offloads("param"):
        offload += (2 if step.peft else 3) * weights * part * accumulation / (PCIE_GB_S * 1e9)
    fastest = max(compute / FASTEST, link) + offload
    return StepTime(
        accumulation * step.tokens, model, executed, moved, link, offload, fastest, compute / SLOWEST + link + offload
    )
