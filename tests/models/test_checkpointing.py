"""Selective checkpointing: the gradients of no checkpointing, the bytes that are kept, the matmuls that are repeated.

Beside it, that an adapter's input which autocast alone casts changes no bit. One process, CPU, tiny models.
"""

from __future__ import annotations

import collections
import warnings

import pytest
import tiny
import torch
import torch.nn.attention.varlen  # it defines the operator
from peft import LoraConfig, get_peft_model
from tiny_architectures import model_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import SFTConfig, SFTTrainer

from kit.inspection.attention import ATTENTION
from kit.models import adapters, attention, checkpointing
from kit.training.trainer import ModifiedTrainer

torch.set_num_threads(1)
attention.register()
ROWS, TOKENS, LAYERS, RANK = 2, 24, 2, 4
HIDDEN, INNER, KEYS, HEADS = 32, 48, 16, 4  # of tiny_architectures' llama: 2 of 4 heads of 8 for the keys
LENGTHS = (17, 5, 26)
ADAPTERS = {"full": None, "lora": {}, "lora dropout": {"lora_dropout": 0.3}}


def llama(adapter: dict | None, attn: str = ATTENTION, dtype: torch.dtype = torch.float32):
    """The same weights at each call, in training mode."""
    model = model_of("llama", attn).to(dtype)
    if adapter is not None:
        settings = {"r": RANK, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, LoraConfig(**{**settings, **adapter}))
        model.enable_input_require_grads()
    return model.train()


def checkpoint(model, level: str):
    if level == "selective":
        checkpointing.enable_selective(model)
    if level != "none":
        model.activation_checkpointing_enable({"selective": True} if level == "selective" else None)
    return model


def batch(rows: str) -> dict:
    if rows == "packed":
        ids = torch.randint(4, 96, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
        ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
        lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 26, "max_length_k": 26}
        return {"input_ids": ids, "labels": ids, "position_ids": positions, **lengths}
    ids = torch.randint(4, 96, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if rows == "padded":
        mask[1, 15:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def loss_of(model, rows: str) -> torch.Tensor:
    torch.manual_seed(3)  # dropout
    return model(**batch(rows), use_cache=False).loss


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys() and one
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("rows", ["full", "padded", "packed"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_gradients_are_those_without_checkpointing(adapter, rows):
    found = []
    for level in ("none", "selective"):
        model = checkpoint(llama(ADAPTERS[adapter]), level)
        loss_of(model, rows).backward()
        found.append(gradients(model))
    assert_equal(*found)


class CountMatmuls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        matmul = name in checkpointing.MATMULS or name in checkpointing.QUANTIZED_MATMULS
        self.counts["matmul" if matmul else "attention" if "attention" in name else ""] += 1
        return func(*args, **(kwargs or {}))


def backward_work(adapter: dict | None, level: str) -> collections.Counter:
    loss = loss_of(checkpoint(llama(adapter), level), "full")
    with CountMatmuls() as counted:
        loss.backward()
    return counted.counts


@pytest.mark.parametrize("adapter", [None, {}])
def test_the_recomputation_multiplies_for_adapters_alone(adapter):
    """Of 7 linear layers; what down_proj and its B give is in no gradient: torch ends before the last matmul."""
    none, selective, full = (backward_work(adapter, level) for level in ("none", "selective", "full"))
    adapters_alone, of_the_base = (0, LAYERS * 6) if adapter is None else (LAYERS * (7 + 6), LAYERS * 7)
    assert selective["matmul"] - none["matmul"] == adapters_alone
    assert selective["attention"] == none["attention"] == LAYERS
    assert full["matmul"] - none["matmul"] == adapters_alone + of_the_base  # a policy that keeps nothing is seen
    assert full["attention"] == 2 * LAYERS


@pytest.mark.parametrize("adapter", [None, {}])
def test_kept_bytes(adapter, monkeypatch):
    """Outputs of the base's linear layers, of attention with its log-sum-exp, and the input of the layer."""
    kept, inputs = [], []
    contexts = checkpointing.create_selective_checkpoint_contexts

    def recorded(policy):
        kept.append(contexts(policy))
        return kept[-1]

    monkeypatch.setattr(checkpointing, "create_selective_checkpoint_contexts", recorded)
    model = checkpoint(llama(adapter, attn="sdpa"), "selective")
    layer = next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    saved: dict[int, int] = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_of(model, "full")
    storages = {}
    for forward, _ in kept:
        for entries in forward.storage.values():
            for entry in entries.values():
                parts = entry if isinstance(entry, tuple) else (entry,)
                for wrapped in parts:
                    if hasattr(wrapped, "val"):
                        storage = wrapped.val.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
    outputs = HIDDEN + 2 * KEYS + HIDDEN + 2 * INNER + HIDDEN
    assert sum(storages.values()) == LAYERS * ROWS * TOKENS * 4 * (outputs + HIDDEN + HEADS)
    held = inputs[0].untyped_storage()
    assert saved[held.data_ptr()] == held.nbytes() == ROWS * TOKENS * 4 * HIDDEN


def test_what_the_policy_keeps():
    policy = checkpointing.make_policy({RANK})

    def keeps(op, *args, **kwargs):
        return policy(None, op, *args, **kwargs) == CheckpointPolicy.MUST_SAVE

    aten, x, q = torch.ops.aten, torch.zeros(6, 8), torch.zeros(1, 2, 6, 8)
    assert keeps(aten.mm.default, x, torch.zeros(8, 5)) and keeps(aten.addmm.default, x[0, :5], x, torch.zeros(8, 5))
    assert not keeps(aten.mm.default, x, torch.zeros(8, RANK)) and not keeps(aten.mm.default, x[:, :4], x[:4])
    shared = torch.zeros(8, 5).expand(3, 8, 5)  # one matrix for all rows, as torch multiplies some strided inputs
    assert keeps(aten.bmm.default, torch.zeros(3, 6, 8), shared)
    assert not keeps(aten.bmm.default, torch.zeros(3, 6, 8), torch.zeros(3, 8, 6))  # scores of attention written out
    assert keeps(torch.ops.torch_attn._varlen_attn.default, q[0], q[0], q[0], None, None, 6, 6)
    for backend in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
        op = getattr(aten, f"_scaled_dot_product_{backend}").default
        given = (q, q, q, None, True) if backend in ("efficient_attention", "cudnn_attention") else (q, q, q)
        assert keeps(op, *given) and keeps(op, *given, dropout_p=0.0), backend
        assert not keeps(op, *given, 0.1) and not keeps(op, *given, dropout_p=0.1), backend
    assert not keeps(aten.silu.default, x) and not keeps(aten._to_copy.default, x)


def test_a_quantized_base():
    """What bitsandbytes multiplies is kept too; o_proj and the two before down_proj have no adapter."""
    bnb = pytest.importorskip("bitsandbytes")
    found, counts = [], []
    for level in ("none", "selective"):
        model = model_of("llama", ATTENTION, hidden_size=64, intermediate_size=64, head_dim=16)
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, linear in list(part.named_children()):
                    if isinstance(linear, torch.nn.Linear):
                        shape = linear.in_features, linear.out_features
                        four = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=torch.float32, quant_type="nf4")
                        four.load_state_dict(linear.state_dict())
                        setattr(part, name, four.to("cpu"))
        settings = {"r": RANK, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))
        model.enable_input_require_grads()
        loss = loss_of(checkpoint(model.train(), level), "full")
        with CountMatmuls() as counted:
            loss.backward()
        found.append(gradients(model))
        counts.append(counted.counts["matmul"])
    assert_equal(*found)
    assert counts[1] - counts[0] == LAYERS * (3 + 2)


# ---- through the trainer ----


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model") / "base")


def trained(cls, base, out, adapter: dict | None, **changes):
    settings = {
        "output_dir": str(out), "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "bf16": False, "report_to": "none", "seed": 7,
        "model_init_kwargs": {"dtype": "float32"}, "max_length": 64, "disable_tqdm": True,
        "activation_checkpointing": True,
    }  # fmt: skip
    peft = None
    if adapter is not None:
        target = {"r": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        peft = LoraConfig(**{**target, **adapter})
    rows = tiny.dataset(tiny.text_rows(8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = cls(str(base), SFTConfig(**{**settings, **changes}), train_dataset=rows,
                      eval_dataset=rows.select(range(2)), peft_config=peft)  # fmt: skip
        trainer.train()
    return trainer


def outcome(trainer) -> dict[str, torch.Tensor]:
    losses = {str(h["step"]): torch.tensor(h["loss"]) for h in trainer.state.log_history if "loss" in h}
    return {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad} | losses


@pytest.mark.parametrize("adapter", ["full", "lora dropout"])
def test_levels_through_the_trainer(base, tmp_path, adapter):
    plain = trained(ModifiedTrainer, base, tmp_path, ADAPTERS[adapter], activation_checkpointing=False)
    for given, flags in (
        ({}, [True, True]),
        ({"selective": True}, [True, True]),
        ({"every_n_layers": 2}, [True, False]),
    ):
        trainer = trained(ModifiedTrainer, base, tmp_path, ADAPTERS[adapter], activation_checkpointing_kwargs=given)
        layers = [m for m in trainer.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        assert [m.gradient_checkpointing for m in layers] == flags
        torch_gets = layers[0]._gradient_checkpointing_func.keywords
        assert torch_gets["use_reentrant"] is False and "selective" not in torch_gets
        context = torch_gets.get("context_fn")
        assert (context is not None) == bool(given.get("selective"))
        if context is not None:
            assert context.args[0].__qualname__ == "make_policy.<locals>.policy"  # not TRL's, which keeps attention
        assert_equal(outcome(plain), outcome(trainer))


# ---- LoRA whose input autocast alone casts ----

CASTS = {  # settings: whether the input stays as it is
    "plain": ({}, True), "rslora": ({"use_rslora": True}, True), "bias": ({"lora_bias": True}, True),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj", "k_proj"], "modules_to_save": ["lm_head"]}, True),
    "dropout": ({"lora_dropout": 0.1}, False), "dora": ({"use_dora": True}, False),
}  # fmt: skip


def cast_steps(settings: dict, change, dtype=torch.bfloat16) -> tuple[dict[str, torch.Tensor], int]:
    """Weights and losses of three steps under autocast, and the bytes that the last one kept for its backward."""
    model = llama(settings, attn="sdpa", dtype=dtype)
    change(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(3)
    found = {}
    for step in range(3):
        saved: list[torch.Tensor] = []  # held, so that no two of them share an address

        def note(tensor, saved=saved):
            saved.append(tensor)
            return tensor

        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = model(**batch("full"), use_cache=False).loss
        loss.backward()
        found[str(step)] = loss.detach()
        optimizer.step()
        optimizer.zero_grad()
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return found | {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, sum(kept.values())


@pytest.mark.parametrize("case", CASTS)
def test_autocast_alone_casts_the_input(case):
    settings, uncast = CASTS[case]
    (before, kept), (after, kept_after) = (
        cast_steps(settings, change) for change in (lambda model: None, adapters.leave_casts_to_autocast)
    )
    assert_equal(before, after)
    assert (kept_after < kept) is uncast


def test_dropout_and_dora_would_change_without_the_cast():
    """Why they keep it: dropout scales in bfloat16, DoRA takes its norms in it."""

    def all_uncast(model):
        for layer in model.modules():
            if hasattr(layer, "cast_input_dtype_enabled"):
                layer.cast_input_dtype_enabled = False

    for case in ("dropout", "dora"):
        settings, _ = CASTS[case]
        before, _ = cast_steps(settings, lambda model: None)
        after, _ = cast_steps(settings, all_uncast)
        assert not torch.equal(before["2"], after["2"]), case


def test_outside_autocast_the_input_is_cast_as_before():
    model = llama({}, attn="sdpa", dtype=torch.bfloat16)
    before = model(**batch("full"), use_cache=False).logits
    adapters.leave_casts_to_autocast(model)
    assert torch.equal(model(**batch("full"), use_cache=False).logits, before)
    ids = batch("full")["input_ids"][:1, :4]
    assert model.generate(input_ids=ids, max_new_tokens=2, do_sample=False).shape == (1, 6)


def test_the_trainer_in_bfloat16(base, tmp_path):
    """Training, evaluation and prediction as with the cast, bit for bit."""
    settings = {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}, "activation_checkpointing": False}
    mine, theirs = (trained(cls, base, tmp_path, {}, **settings) for cls in (ModifiedTrainer, SFTTrainer))
    uncast = [m for m in mine.model.modules() if "_cast_input_dtype" in vars(m)]
    assert len(uncast) == 7 * LAYERS
    assert_equal(outcome(theirs), outcome(mine))
    assert mine.evaluate()["eval_loss"] == theirs.evaluate()["eval_loss"]
    rows = mine.eval_dataset
    assert (mine.predict(rows).predictions[0] == theirs.predict(rows).predictions[0]).all()
