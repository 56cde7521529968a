"""On the path of a measured process: appends `loaded` and `stepped`, with the time, to the file $MISTAKES_MARKS.

`loaded`: a from_pretrained of transformers has come back with a model. `stepped`: the Trainer, or a DeepSpeed engine,
has taken a training step. The methods are wrapped when their modules are first imported. And where DeepSpeed is told
to use NCCL it gets gloo: there is no GPU here, and Axolotl names NCCL in its source.
"""

import importlib.abc
import importlib.util
import os
import sys
import time

WRAPPED = {
    "transformers.modeling_utils": ("PreTrainedModel", "from_pretrained", "loaded"),
    "transformers.trainer": ("Trainer", "training_step", "stepped"),
    "deepspeed.runtime.engine": ("DeepSpeedEngine", "step", "stepped"),
}


def mark(what):
    with open(os.environ["MISTAKES_MARKS"], "a") as f:
        f.write(f"{what} {time.time()}\n")


def wrap(module, kind, method, what):
    owner = getattr(module, kind)
    given = owner.__dict__[method]
    inner = given.__func__ if isinstance(given, classmethod) else given

    def marked(*a, **k):
        result = inner(*a, **k)
        mark(what)
        return result

    marked.__wrapped__, marked.__name__, marked.__doc__ = inner, inner.__name__, inner.__doc__
    setattr(owner, method, classmethod(marked) if isinstance(given, classmethod) else marked)


def use_gloo(module):
    given = module.init_distributed

    def init_distributed(dist_backend=None, *a, **k):
        return given("gloo", *a, **k)

    module.init_distributed = init_distributed


class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in WRAPPED and name != "deepspeed.comm.comm":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            wrap(module, *WRAPPED[name]) if name in WRAPPED else use_gloo(module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("MISTAKES_MARKS"):
    sys.meta_path.insert(0, Hook())
