"""The rules of optional packages: what a run needs beside the training stack, asked of the installed packages by name.

kit/config/rules/table.py lists them. Trackers and bitsandbytes have rules of their own.
"""

from __future__ import annotations

from kit.config.rules.context import RuleContext, Violations
from kit.config.rules.trainer import setting
from kit.schema import fields
from kit.schema.dotted import value_at
from kit.system.dependencies import is_installed

METHODS = {"ADAMSS": ("sklearn", "scikit-learn")}  # PEFT method: (module, what pip installs)


def needed_packages(run: RuleContext) -> list[tuple[str, str, str, str]]:
    """(module, what pip installs, key, its value) of all that the settings ask for."""
    needed = []
    optimizer = fields.optimizers().get(setting(run, "optim"), {})
    if "package" in optimizer and not value_at(run.plan["deepspeed"], "optimizer"):
        needed.append((optimizer["package"], optimizer["pip"], "trainer.optim", setting(run, "optim")))
    if setting(run, "use_liger_kernel"):
        needed.append(("liger_kernel", "liger-kernel", "trainer.use_liger_kernel", "true"))
    method = str((run.plan["peft"] or {}).get("peft_type", "")).upper()
    if method in METHODS:
        needed.append((*METHODS[method], "peft.peft_type", method))
    return needed


def missing(run: RuleContext) -> Violations:
    """A bare install looks at runs of other machines, and has nothing to say of their packages."""
    for module, pip, key, value in needed_packages(run) if is_installed("torch") else ():
        if not is_installed(module):
            name = key.partition(".")[2]
            yield f"{name}={value} needs {module}, which is not installed on this machine", key, f"pip install {pip}"
