"""A prompt of the alpaca data sets that no format of the kit writes, as a template."""

from __future__ import annotations

NO_INPUT = "rows without an input keep an empty input block"
ALPACA_CHAT = {
    "prompt": "SYSTEM: Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\nUSER: {instruction}\n{input}\nASSISTANT:",
    "completion": "{output}",
}
