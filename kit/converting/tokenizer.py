"""tokenizer.model of a Meta checkpoint: sentencepiece until Code Llama, tiktoken's "base64 rank" lines after it."""

from __future__ import annotations

import base64
import binascii
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.errors import KitError

RESERVED_TOKENS = 256  # special tokens behind Llama-3's ranks
# How Llama-3 splits text before it merges bytes; given with its release.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Places among the special tokens; all others are <|reserved_special_token_N|>, counted in order.
LLAMA3 = {
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>",
}  # fmt: skip
LLAMA31 = {**LLAMA3, 4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
PROBE_TEXTS = ("The Danube rises in 1 of 2 brooks.", "  def f(x):\n\treturn x**2\n", "Ünïcödé 日本語 🙂", " ", "")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer.model that was read; `ranks` (bytes -> id) for tiktoken, None for sentencepiece."""

    path: Path
    size: int
    ranks: dict[bytes, int] | None = None

    def bos_and_ends(self, scaled_rope: bool) -> tuple[int, list[int]]:
        """The id that starts a text, and those that end one, the text's own end first."""
        if self.ranks is None:
            model = _read_sentencepiece(self.path)
            return model.bos_id(), [model.eos_id()]
        special = special_tokens(scaled_rope)
        ends = [n for n in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>") if n in special]
        return len(self.ranks), [len(self.ranks) + special.index(n) for n in ends]


def special_tokens(scaled_rope: bool) -> list[str]:
    """Llama-3's special tokens in the order of their ids; scaled RoPE and three more names came with Llama-3.1."""
    names = LLAMA31 if scaled_rope else LLAMA3
    numbers = iter(range(RESERVED_TOKENS))
    return [names[i] if i in names else f"<|reserved_special_token_{next(numbers)}|>" for i in range(RESERVED_TOKENS)]


def read_vocabulary(path: Path) -> Vocabulary:
    """Read tokenizer.model of either kind; KitError where it is damaged."""
    data = path.read_bytes()
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):
        ranks = _read_ranks(path, data)
        return Vocabulary(path, len(ranks) + RESERVED_TOKENS, ranks)
    model = _read_sentencepiece(path)
    if min(model.bos_id(), model.eos_id()) < 0:
        raise KitError(f"{path} has no <s> or no </s>", "DIR", "give the tokenizer.model of Meta's release")
    return Vocabulary(path, model.get_piece_size())


def _read_ranks(path: Path, data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            if line.strip():
                raise KitError(
                    f"{path} is damaged: not a token and its rank", f"line {number}", "fetch the file again"
                ) from None
    complete = sorted(ranks.values()) == list(range(len(ranks))) and all(bytes([b]) in ranks for b in range(256))
    if not complete:
        raise KitError(f"{path} is damaged or cut short: ranks are missing", "DIR", "fetch the file again")
    return ranks


def _read_sentencepiece(path: Path) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (RuntimeError, OSError):
        raise KitError(
            f"{path} is damaged: neither a sentencepiece model nor tiktoken's ranks",
            "DIR",
            "fetch the file again",
        ) from None


def write_tokenizer(vocabulary: Vocabulary, folder: Path, scaled_rope: bool, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json; KitError where they would not encode as the original does.

    Both put the begin token before a text. A sentencepiece model is copied as well: llama.cpp and others read it.
    """
    from transformers import PreTrainedTokenizerFast

    if vocabulary.ranks is None:
        shutil.copyfile(vocabulary.path, folder / "tokenizer.model")
        raw, names = _from_sentencepiece(folder)
    else:
        raw, names = _from_ranks(vocabulary.ranks, special_tokens(scaled_rope))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, model_max_length=max_length, clean_up_tokenization_spaces=False, **names
    )
    if vocabulary.ranks is None:
        original = _read_sentencepiece(vocabulary.path)
        wrong = [text for text in PROBE_TEXTS if tokenizer(text).input_ids != original.encode(text, add_bos=True)]
    else:
        wrong = [text for text in PROBE_TEXTS if tokenizer.decode(tokenizer.encode(text)[1:]) != text]
    if wrong:
        problem = f"{vocabulary.path} cannot be converted: {wrong[0]!r} is encoded differently"
        raise KitError(problem, "DIR", "take the tokenizer of the model's Hub repository: tokenizer.name_or_path=...")
    tokenizer.save_pretrained(folder)


def _from_sentencepiece(folder: Path) -> tuple[Any, dict[str, str]]:
    """Pieces and merges as transformers reads them, with sentencepiece's own rule for spaces.

    LlamaTokenizer's rule drops one of a text's leading spaces and puts none after a special token.
    """
    from tokenizers import normalizers
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
    raw = tokenizer.backend_tokenizer
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.pre_tokenizer = None
    names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "unk_token": tokenizer.unk_token}
    return raw, names


def _from_ranks(ranks: dict[bytes, int], special: list[str]) -> tuple[Any, dict[str, str]]:
    """A byte-level BPE.

    tiktoken joins the pair whose union has the lowest rank, so the merges are every split of every token into two
    known parts, by rank of the whole.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    text = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in splits if a in ranks and b in ranks]
        merges += [(text[a], text[b]) for a, b in sorted(pairs, key=lambda s: (ranks[s[0]], ranks[s[1]]))]
    raw = Tokenizer(models.BPE({text[t]: r for t, r in ranks.items()}, merges, ignore_merges=True))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    begin, end = special[0], special[1]
    template = processors.TemplateProcessing(f"{begin} $A", f"{begin} $A {begin}:1 $B:1", [(begin, len(ranks))])
    raw.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return raw, {"bos_token": begin, "eos_token": end}
