"""Tiny models and adapters on disk for the merge tests, and what peft makes of them."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kit.storage.safetensors_header import fingerprint_tensors

VOCAB = 64
torch.set_num_threads(1)  # these models are too small to share


def llama(
    folder: Path, *, seed=0, tie=False, layers=2, dtype=torch.float32, shard="5GB", hidden=32, bias=True
) -> Path:
    """A Llama-shaped base."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        vocab_size=VOCAB,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
        attention_bias=bias,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def gpt2(folder: Path, *, prefix=True, dtype=torch.float32) -> Path:
    """A GPT-2-shaped base; without `prefix` its tensors are named as the Hub's old checkpoints name them."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).to(dtype).save_pretrained(folder)
    if not prefix:
        file = folder / "model.safetensors"
        save_file({k.removeprefix("transformer."): v for k, v in load_file(file).items()}, file, {"format": "pt"})
    return folder


def adapt(base: Path, folder: Path, *, vocabulary=None, record=False, seed=1, strength=0.1, **fields) -> Path:
    """Train nothing, but move every adapter parameter, and save as a run would."""
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]} | fields
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if vocabulary:
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **fields))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.02 * parameter.abs().mean() if "magnitude" in name else strength
                parameter.data += torch.randn_like(parameter) * scale
        model.save_pretrained(folder)
    if record:
        write_manifest(base, folder)
    return folder


def write_manifest(base: Path, folder: Path) -> None:
    """The manifest that a run leaves beside its adapter."""

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    files = {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in sorted(folder.glob("adapter_*"))}
    origin = {"name_or_path": str(base), "revision": None, "config_sha256": digest(base / "config.json")}
    origin["fingerprint"] = fingerprint_tensors(base)
    manifest = {"format": 1, "kind": "adapter", "step": 1, "base": origin, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def trained(base: Path, adapter: Path, vocabulary: int | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of base + adapter, and the weights of peft's own merge, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if vocabulary:
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
        model = PeftModel.from_pretrained(model, adapter).eval()
        logits = model(tokens()).logits
        merged = model.merge_and_unload()
    return logits, dict(merged.named_parameters())


@torch.no_grad()
def logits_of(folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and weights of a merged folder, loaded as any user would, in float32."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()(tokens()).logits, dict(model.named_parameters())
