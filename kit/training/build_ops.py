"""`python -m kit.training.build_ops NAME ...`: compile DeepSpeed operators into TORCH_EXTENSIONS_DIR."""

from __future__ import annotations

import sys


def main(names: list[str]) -> None:
    from deepspeed.accelerator import get_accelerator

    for name in names:
        if name == "deepspeed_shm_comm":
            from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

            builder = ShareMemCommBuilder()
        else:
            builder = get_accelerator().create_op_builder(
                {"cpu_adam": "CPUAdamBuilder", "fused_adam": "FusedAdamBuilder", "async_io": "AsyncIOBuilder"}[name]
            )
        builder.load(verbose=False)


if __name__ == "__main__":
    main(sys.argv[1:])
