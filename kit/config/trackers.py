"""Which experiment trackers a run reports to, and whether they are there."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kit.config.rules import Facts

# transformers' names (integrations/integration_utils.py) and the package that each imports, "" for none; another
# name is refused with the field's own choices.
KNOWN = {
    "azure_ml": "azureml", "clearml": "clearml", "codecarbon": "codecarbon", "comet_ml": "comet_ml",
    "dagshub": "dagshub", "dvclive": "dvclive", "flyte": "flytekit", "kubeflow": "", "mlflow": "mlflow",
    "neptune": "neptune", "swanlab": "swanlab", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip
OURS = ("tensorboard", "wandb", "mlflow", "trackio")  # extras of this package, kept inside the run directory
KEY = "trainer.report_to"


def names(report_to: Any) -> list[str]:
    """`report_to` as a list; empty for none."""
    listed = [report_to] if isinstance(report_to, str) else list(report_to or [])
    return [str(name) for name in listed if name != "none"]


def whatever_is_installed(f: Facts) -> Iterator[tuple[str, str, str]]:
    if "all" in names(f.plan["trainer"].get("report_to")):
        yield (
            "report_to=all reports to whatever happens to be installed where the run starts",
            KEY,
            f"name them: tracking=tensorboard, or {KEY}=[tensorboard,wandb]",
        )


def missing(f: Facts) -> Iterator[tuple[str, str, str]]:
    for name in names(f.plan["trainer"].get("report_to")):
        package = KNOWN.get(name)
        if package and find_spec(package) is None:
            fix = f"pip install 'finetune-kit[{name}]'" if name in OURS else f"pip install {package}"
            yield f"{name} is not installed", KEY, f"{fix}, or tracking=none"


def online(f: Facts) -> Iterator[tuple[str, str, str]]:
    for name in names(f.plan["trainer"].get("report_to")):
        if name in KNOWN and name not in OURS:
            yield (
                f"{name} sends what its own settings say: the kit keeps only {', '.join(OURS)} on this machine",
                KEY,
                "tracking=none keeps metrics.jsonl alone",
            )
