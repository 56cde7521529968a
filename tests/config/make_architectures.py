"""Write kit/inspection/architectures.json from transformers: `python tests/config/make_architectures.py`.

`kit check` says what an architecture is without importing transformers; tests/config/test_architectures.py compares.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

TARGET = pathlib.Path(__file__).parents[2] / "kit" / "inspection" / "architectures.json"


def build() -> dict[str, Any]:
    from transformers import __version__
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    towers = {**auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, **auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    # AutoModelForCausalLM builds the text part alone of some (llama4, qwen3_5): these are causal models here. It does
    # so for mllama too, whose text part has layers that only attend to images.
    multimodal = {t for t, cls in towers.items() if causal.get(t, cls) == cls} | {"mllama"}
    seq2seq = {*auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES}
    masked = {*auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES}
    kinds = {
        "causal": {*causal} - multimodal - seq2seq - masked,
        "multimodal": multimodal,
        "encoder_decoder": seq2seq - multimodal,
        "encoder": masked - seq2seq - multimodal,
    }
    return {"generated_from": {"transformers": __version__}, "kinds": {k: sorted(v) for k, v in kinds.items()}}


def dump(data: dict[str, Any]) -> str:
    """JSON with one model type to a line, so that an upgrade reads well as a diff."""
    return json.dumps(data, indent=1) + "\n"


if __name__ == "__main__":
    text = dump(build())
    TARGET.write_text(text)
    print(f"{TARGET.name}: {len(text)} bytes")
