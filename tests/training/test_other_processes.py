"""What a resume by another number of processes rests on: the same rows in each step, or a refusal."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import save_file
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from kit.storage import checkpoints

GLOBAL = 8


def steps_of_epoch(
    rows: int, processes: int, per_device: int, skipped: int, sampler=None, **loader
) -> list[list[int]]:
    """The rows of each optimizer step from step `skipped` on, as transformers' trainer and accelerate divide them."""
    accumulation = GLOBAL // (processes * per_device)
    data = list(range(rows))
    ranks = []
    for rank in range(processes):
        torch.manual_seed(7)  # every rank starts with the same seed
        stock = DataLoader(data, per_device, sampler=(sampler or RandomSampler)(data), collate_fn=list)
        loader = {"use_seedable_sampler": True, "data_seed": 7, **loader}
        if "drop_last" in loader:
            stock = DataLoader(data, per_device, sampler=RandomSampler(data), collate_fn=list, drop_last=True)
        settings = {k: v for k, v in loader.items() if k != "drop_last"}
        made = prepare_data_loader(stock, num_processes=processes, process_index=rank, put_on_device=False, **settings)
        made = skip_first_batches(made, skipped * accumulation) if skipped else made
        ranks.append(list(made.batch_sampler))
    micro = [sum(batches, []) for batches in itertools.zip_longest(*ranks, fillvalue=[])]
    return [sum(micro[i : i + accumulation], []) for i in range(0, len(micro), accumulation)]


@pytest.fixture(scope="module", autouse=True)
def one_process():
    PartialState(cpu=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("sampler", [RandomSampler, SequentialSampler])
@pytest.mark.parametrize("rows", [64, 61, 52, 8, 5])
def test_any_division_gives_the_same_rows_in_each_step(sampler, rows):
    """Also after a skip; an epoch's last step alone may repeat rows of its first, as it does where nothing resumes."""
    whole = [sorted(step) for step in steps_of_epoch(rows, 1, 8, 0, sampler)]
    assert sorted(sum(whole, [])) == list(range(rows)) and len(whole) == math.ceil(rows / GLOBAL)
    for processes, per_device in [(1, 2), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)]:
        for skipped in {0, 3, len(whole) - 1} & set(range(len(whole))):
            steps = [sorted(step) for step in steps_of_epoch(rows, processes, per_device, skipped, sampler)]
            assert len(steps) == len(whole) - skipped, (processes, per_device, skipped)
            assert steps[:-1] == whole[skipped:-1], (processes, per_device, skipped)
            assert set(steps[-1]) >= set(whole[-1]), (processes, per_device, skipped)
            if rows % (processes * per_device) == 0:
                assert steps[-1] == whole[-1]


def by_length(size):
    return lambda data: LengthGroupedSampler(size, lengths=[(i * 37) % 50 for i in data])


@pytest.mark.parametrize(
    ("trainer", "streaming", "word", "other"),
    [
        ({}, False, "", None),
        ({"train_sampling_strategy": "sequential", "accelerator_config": {"even_batches": True}}, False, "", None),
        ({"dataloader_drop_last": True}, False, "drop_last", lambda p, b: steps_of_epoch(18, p, b, 0, drop_last=True)),
        (
            {"train_sampling_strategy": "group_by_length"}, False, "group_by_length",
            lambda p, b: steps_of_epoch(400, p, b, 0, by_length(GLOBAL // p)),
        ),
        (
            {"accelerator_config": {"split_batches": True}}, False, "split_batches=true",
            lambda p, b: steps_of_epoch(48, p, b, 0, split_batches=True),
        ),
        ({"accelerator_config": {"use_seedable_sampler": False}}, False, "use_seedable_sampler=false", None),
        ({"accelerator_config": "file.json"}, False, "", None),
        ({}, True, "streaming", None),
    ],
)  # fmt: skip
def test_an_order_that_depends_on_the_processes_is_refused(trainer, streaming, word, other):
    """And does depend on them, where that is shown in this process."""
    reason = checkpoints.why_other_order(trainer, streaming)
    assert word in reason and bool(word) == bool(reason)
    if other:
        one, two = ([sorted(step) for step in other(*division)] for division in ((1, 2), (2, 2)))
        assert one != two


ZERO2 = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("deepspeed", "adapter", "word"),
    [
        (ZERO2, True, ""),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "mics_shard_size": -1}}, True, ""),
        (ZERO2, False, "whole model"),
        ({"zero_optimization": {"stage": 0}}, True, "stages 1 to 3"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, True, "NVMe"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, True, "NVMe"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, True, "ratio"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}, True, "hpz"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, True, "mics"),
        ({"zero_optimization": {"stage": 2}, "tensor_parallel": {"autotp_size": 2}}, True, "tensor parallelism"),
    ],
)
def test_what_keeps_an_optimizer_from_being_saved_whole(deepspeed, adapter, word, tmp_path):
    """The refusal says it, with a way on; the same processes and an engine without DeepSpeed are never refused."""
    reason = checkpoints.why_not_whole(deepspeed, adapter)
    assert word in reason and bool(word) == bool(reason)
    about = {"trainer": {}, "streaming": False, "adapter": adapter, "start_anew": "kit train peft.init_from=X"}
    (problem,) = checkpoints.refuse_resume(tmp_path, 2, 1, deepspeed=deepspeed, **about)
    assert (reason or checkpoints.WHOLE_OPTIMIZER) in problem.problem
    assert "launch.num_gpus=2" in problem.fix and "kit train peft.init_from=X" in problem.fix
    assert not checkpoints.refuse_resume(tmp_path, 2, 2, deepspeed=deepspeed, **about)
    assert not checkpoints.refuse_resume(tmp_path, 2, 1, deepspeed=None, **about)
    save_file({}, tmp_path / checkpoints.WHOLE_OPTIMIZER, metadata={checkpoints.LAYOUT: "ZeRO-1"})
    for saved_by in (1, 2):  # another number of processes, or another layout
        found = checkpoints.refuse_resume(tmp_path, saved_by, 2, deepspeed=deepspeed, **about)
        assert [reason in p.problem for p in found] == ([True] if reason else [])
    both = checkpoints.refuse_resume(tmp_path / "other", 2, 1, deepspeed=deepspeed, **{**about, "streaming": True})
    assert len(both) == 2  # all at once


def test_the_command_for_a_new_run_keeps_the_batch_and_what_the_resume_was_given():
    begun = ["++model.name_or_path=b", "++trainer.gradient_accumulation_steps=2", "launch=torchrun"]
    resumed = ["launch.num_gpus=1", "trainer.max_steps=9"]
    command = checkpoints.start_from_weights(Path("r/checkpoints/checkpoint-5"), begun, resumed, 8, True)
    assert command == (
        "kit train model.name_or_path=b launch=torchrun launch.num_gpus=1 global_batch_size=8 "
        "peft.init_from=r/checkpoints/checkpoint-5"
    )
    command = checkpoints.start_from_weights(Path("r/c"), begun, [], 8, False)
    assert command == "kit train launch=torchrun global_batch_size=8 model.name_or_path=r/c"
