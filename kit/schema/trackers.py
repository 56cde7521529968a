"""The experiment trackers that transformers knows, and those that a run reports to."""

from __future__ import annotations

from typing import Any

# transformers' names (integrations/integration_utils.py) and the package that each imports, "" for none; another
# name is refused with the field's own choices.
KNOWN = {
    "azure_ml": "azureml", "clearml": "clearml", "codecarbon": "codecarbon", "comet_ml": "comet_ml",
    "dagshub": "dagshub", "dvclive": "dvclive", "flyte": "flytekit", "kubeflow": "", "mlflow": "mlflow",
    "neptune": "neptune", "swanlab": "swanlab", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip
OURS = ("tensorboard", "wandb", "mlflow", "trackio")  # extras of this package, kept inside the run directory
KEY = "trainer.report_to"


def tracker_names(report_to: Any) -> list[str]:
    """`report_to` as a list; empty for none."""
    listed = [report_to] if isinstance(report_to, str) else list(report_to or [])
    return [str(name) for name in listed if name != "none"]
