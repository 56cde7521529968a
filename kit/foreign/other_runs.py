"""What is no supervised fine-tuning of text, and no tool that is read here, known by names.

Names are all that a command line and a config tell of the code behind them: of the script, of the model, of keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

OTHER_METHODS = (
    "dpo orpo kto cpo bco simpo ppo rloo grpo gkd gspo dapo reinforce rlhf reward prm rm nash xpo spin ilql rl "
    "preference distill distillation"
).split()
OTHER_MODELS = (
    "vlm vl vision multimodal mllm image images img2img text2image audio speech asr whisper wav2vec clip siglip "
    "dreambooth diffusion controlnet unet classification segmentation detection glue squad ner qa mlm plm seq2seq "
    "translation summarization embedder embedding embeddings reranker retrieval retriever resnet imagenet cifar "
    "mnist bert"
).split()
NO_TRAINING = (
    "eval evaluate evaluation inference infer generate generation predict merge convert export serve demo benchmark "
    "chat quantize split process preprocess tokenize prepare test calculator upload download"
).split()
# Models that read more than text, or do not write on: by their published names.
MODEL_NAME = re.compile(
    r"(^|[-_/.\d])(vl\d?|vlm\d?|llava|internvl\w*|vision|omni|idefics\d?|paligemma\d?|pixtral|smolvlm\d?|blip\d?|clip"
    r"|siglip\d?|vit|whisper|wav2vec\d?|voxtral|(distil|ro|de)?bert(a|ta)?|t5|flan-t5|bart|pegasus|sdxl|flux"
    r"|stable-diffusion|controlnet)([-_/.\d]|$)",
    re.I,
)
MEDIA_KEY = re.compile(
    r"^((image|images|video|videos|audio|vision|visual|mm|vit|pixel)_\w+|\w+_(image|images|video|audio)(_\w+)?"
    r"|freeze_(vision|vit|visual|backbone|multi_modal|mm)\w*|is_multimodal|(max|min)_pixels|resolution)$"
)
REWARD_KEY = re.compile(
    r"^(reward_(model|funcs|weights)\w*|ref_model(_name_or_path|_path)?|rlhf_type|pref_(loss|beta)|critic_\w+"
    r"|actor_\w+|num_ppo_epochs|ppo_\w+|kl_penalty\w*|verifier\w*|vllm_\w+|response_max_length)$"
)
# Tools whose files are not read here: so many of these keys at the top are theirs.
OTHER_TOOLS = {
    "ms-swift": (1, "tuner_type rlhf_type model_author split_dataset_ratio"),
    "LLaMA-Factory v1, whose keys are others than those of v0": (
        2, "model_class train_dataset kernel_config dist_config quant_config init_config optim_config"),
    "verl": (2, "actor_rollout_ref algorithm critic optim ulysses_sequence_parallel_size use_remove_padding"),
    "NeMo": (1, "exp_manager"),
    "nanotron": (2, "general parallelism data_stages lighteval tokens"),
    "trlX": (3, "train method scheduler"),
}  # fmt: skip


def words_of(name: str) -> list[str]:
    """The words of a script's or a module's name: run_dpo.py, trl.scripts.dpo, examples/reward-model.py."""
    stem = re.sub(r"\.(py|sh)$", "", name.rpartition("/")[2])
    return [re.sub(r"\d+$", "", word) or word for word in re.split(r"[^a-z0-9]+", stem.lower()) if word]


def describe_script(name: str) -> str | None:
    """What a script of that name does instead of fine-tuning on text; None where the name does not say so."""
    words = words_of(name)
    if found := next((w for w in words if w in OTHER_METHODS), None):
        return f"{name} ({found}) is no supervised fine-tuning of text"
    if found := next((w for w in words if w in OTHER_MODELS), None):
        return f"{name} ({found}) is no supervised fine-tuning of text"
    trains = {"train", "training", "sft", "finetune", "finetuning", "tune", "tuning"} & set(words)
    folder = set(words_of(name.rpartition("/")[0])) & {"eval", "evaluation", "inference", "benchmarks"}
    if not trains and (found := next((w for w in [*words, *folder] if w in NO_TRAINING or w in folder), None)):
        return f"{name} ({found}) does not train"
    return None


def describe_keys(keys: dict[str, Any]) -> tuple[str, str] | None:
    """(what else a run is, the key that says so), by keys that are given and not switched off."""
    given = {k: v for k, v in keys.items() if isinstance(k, str) and v not in (None, False, "", [], {})}
    for key in given:
        if MEDIA_KEY.match(key):
            return f"{key} is given, so the rows hold images or sound", key
        if REWARD_KEY.match(key):
            return f"{key} belongs to another trainer (rewards, preferences)", key
    return None


def describe_model(name: Any) -> str | None:
    """What a model is, by its published name, where it is no writer of text alone."""
    short = "/".join(str(name).rstrip("/").rsplit("/", 2)[-2:])
    if isinstance(name, str) and (found := MODEL_NAME.search(short)):
        return f"the model {short} ({found[2]}) does not read and write text alone"
    return None


def describe_tool(tree: dict[Any, Any]) -> str | None:
    """The tool whose file this is, where it is one that is not read here."""
    if any("_component_" in block for block in blocks_of(tree)):
        return "torchtune"
    for tool, (least, keys) in OTHER_TOOLS.items():
        if len(set(keys.split()) & set(tree)) >= least:
            return tool
    return None


def blocks_of(tree: Any) -> Iterable[dict[Any, Any]]:
    if isinstance(tree, dict):
        yield tree
        for value in tree.values():
            if isinstance(value, dict):
                yield value
