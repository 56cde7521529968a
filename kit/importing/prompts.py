"""The prompt of the alpaca data sets, which two of the tools write into every row, as templates of the kit."""

from __future__ import annotations

NO_INPUT = "rows without an input keep an empty input block"
ALPACA_HEAD = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
ALPACA_BLOCKS = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
ALPACA = {"prompt": f"{ALPACA_HEAD}{ALPACA_BLOCKS}\n", "completion": "{output}"}
ALPACA_CHAT = {
    "prompt": f"SYSTEM: {ALPACA_HEAD.strip()}\nUSER: {{instruction}}\n{{input}}\nASSISTANT:",
    "completion": "{output}",
}


def chat_template_of(prompt: str, query: str | None, response: str, system: str | None) -> dict[str, str]:
    """Instruction, input and output as a chat, which the tokenizer's own template then writes."""
    chat = {"system": "{" + system + "}"} if system else {}
    user = "{" + prompt + "}" + ("\n{" + query + "}" if query else "")
    return {**chat, "user": user, "assistant": "{" + response + "}"}
