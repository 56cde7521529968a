"""What is typed has an effect: settings that nobody reads and methods that nobody prepares, beside the libraries."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from kit import api
from kit.config.rules import effect, quantization
from kit.errors import KitError
from kit.inspection.trainable import is_in_layers
from kit.schema import fields

PEFT = ("peft=none", "peft.task_type=CAUSAL_LM")
LOADED = "model.name_or_path=some/hub", "trainer.max_length=64"


@pytest.fixture
def ask(base: Path, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """{rule: keys} of all that refuses or warns of a run."""
    monkeypatch.chdir(tmp_path)

    def compose(line: str) -> dict[str, str]:
        own = line.split()
        stock = [f"dataset.path={chat}", "trainer.max_length=64", "trainer.use_cpu=true", "trainer.bf16=false"]
        stock += [] if any(o.startswith("model.name_or_path") for o in own) else [f"model.name_or_path={base}"]
        try:
            return {w["rule"]: w["where"] + w["problem"] for w in api.compose(*stock, *own).warnings}
        except KitError as error:
            return {p.rule: p.where + p.problem for p in error.problems}

    return compose


NF4, INT8 = "quantization=nf4", "quantization=int8"
METHOD = "peft=none peft.peft_type={} peft.num_virtual_tokens=4 trainer.gradient_checkpointing=false"
# Overrides under which a key of NO_EFFECT is read by nobody, and under which it is read (None: never, or refused).
CASES = {
    "peft.eva_config": ("peft.eva_config={rho:1.5}", None),
    "peft.corda_config": ("peft.corda_config={corda_method:kpm}", None),
    "peft.lora_ga_config": ("peft.lora_ga_config={scale:stable}", None),
    "peft.loftq_config": ("peft.loftq_config.loftq_bits=4", None),
    "peft.qalora_group_size": ("peft.qalora_group_size=8", "peft.qalora_group_size=8 peft.use_qalora=true"),
    "peft.megatron_core": ("peft.megatron_core=mine", None),
    "peft.mask_interval": ("peft=none peft.peft_type=ADAMSS peft.mask_interval=7", None),
    "peft.svd_threshold": ("peft=none peft.peft_type=ADAMSS peft.svd_threshold=0.5",
                           "peft=none peft.peft_type=ADAMSS peft.svd_threshold=0.5 peft.use_dynamic_rank=true"),
    "peft.encoder_hidden_size": (METHOD.format("PREFIX_TUNING") + " peft.encoder_hidden_size=8",
                                 METHOD.format("PREFIX_TUNING")
                                 + " peft.encoder_hidden_size=8 peft.prefix_projection=true"),
    "peft.encoder_num_layers": (METHOD.format("P_TUNING") + " peft.encoder_num_layers=3",
                                METHOD.format("P_TUNING")
                                + " peft.encoder_num_layers=3 peft.encoder_reparameterization_type=LSTM"),
    "peft.prompt_tuning_init_text": (METHOD.format("PROMPT_TUNING") + " peft.prompt_tuning_init_text=hello", None),
    "peft.rank_dropout_scale": ("peft=none peft.peft_type=LOKR peft.rank_dropout_scale=true",
                                "peft=none peft.peft_type=LOKR peft.rank_dropout_scale=true peft.rank_dropout=0.1"),
    "peft.num_cayley_neumann_terms": (
        "peft=none peft.peft_type=OFT peft.num_cayley_neumann_terms=3 peft.use_cayley_neumann=false",
        "peft=none peft.peft_type=OFT peft.num_cayley_neumann_terms=3 peft.use_cayley_neumann=true"),
    "peft.eps": ("peft=none peft.peft_type=OFT peft.eps=1.0e-4",
                 "peft=none peft.peft_type=OFT peft.eps=1.0e-4 peft.coft=true"),
    "peft.ensure_weight_tying": ("peft.ensure_weight_tying=true", None),
    "quantization.bnb_4bit_quant_type": (f"{INT8} quantization.bnb_4bit_quant_type=nf4", NF4),
    "quantization.llm_int8_threshold": (f"{NF4} quantization.llm_int8_threshold=5.0",
                                        f"{INT8} quantization.llm_int8_threshold=5.0"),
    "trainer.adam_beta1": ("trainer.optim=adafactor trainer.adam_beta1=0.8", "trainer.adam_beta1=0.8"),
    "trainer.adam_epsilon": ("trainer.optim=lion_32bit trainer.adam_epsilon=1.0e-6",
                             "trainer.optim=adamw_torch trainer.adam_epsilon=1.0e-6"),
    "trainer.dataset_kwargs": ("trainer.dataset_kwargs={add_special_tokens:false}", None),
    "trainer.packing_strategy": ("trainer.packing_strategy=bfd_split",
                                 "trainer.packing_strategy=bfd_split trainer.packing=true"),
    "trainer.eval_packing": ("trainer.eval_packing=true", "trainer.eval_packing=true dataset.test_size=4"),
    "dataset.max_bad_rows": ("dataset.max_bad_rows=5 dataset.on_long_row=refuse", "dataset.max_bad_rows=5"),
    "dataset.mix_until": ("dataset.mix_until=all_exhausted", None),
}  # fmt: skip


def test_every_row_has_a_case():
    assert all(any(key in CASES for key in keys.split()) for keys, *_ in effect.NO_EFFECT)
    tables = fields.field_tables()
    for keys, *_ in effect.NO_EFFECT:
        for key in keys.split():
            section, _, name = key.partition(".")
            where = {"trainer": ["SFTConfig"], "quantization": ["BitsAndBytesConfig"], "peft": fields.peft_types()}
            assert section == "dataset" or any(name in tables[t] for t in where[section]), key


@pytest.mark.parametrize("key", CASES)
def test_what_nobody_reads_is_refused(key: str, ask):
    unread, read = CASES[key]
    said = ask(unread)
    assert key in said.get("no-effect", ""), said
    if read:
        assert "no-effect" not in ask(read)


def test_defaults_and_groups_are_not_refused(ask):
    assert ask("trainer.optim=adafactor trainer.adam_beta1=0.9") == {}  # the library's own value
    assert "no-effect" not in ask(INT8) and "no-effect" not in ask(NF4)
    assert ask("trainer.optim=adafactor") == {}


def test_which_optimizers_take_betas_and_epsilon():
    """transformers' own function, with other values: what does not change the optimizer's settings is in a list."""
    from transformers import Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    tried = []

    def settings(name: str, **values: float) -> object:
        args = TrainingArguments(output_dir="x", optim=name, use_cpu=True, report_to=[], **values)
        if name.startswith(("galore", "apollo")):
            args.optim_target_modules = ["q"]
        return Trainer.get_optimizer_cls_and_kwargs(args, None)[1]

    for name in [o.value for o in OptimizerNames]:
        try:
            plain = settings(name)
        except Exception:  # its package is not installed
            continue
        betas, epsilon = settings(name, adam_beta1=0.5) != plain, settings(name, adam_epsilon=1e-3) != plain
        if name in effect.WITHOUT_ADAM:
            assert not betas and not epsilon, name
        elif name in effect.BETAS_ALONE:
            assert betas and not epsilon, name
        else:
            assert betas and epsilon, name
        tried.append(name)
    assert {"adamw_torch", "adafactor", "sgd", "lion_32bit", "rmsprop", "adamw_bnb_8bit"} <= {*tried}
    assert {*effect.WITHOUT_ADAM, *effect.BETAS_ALONE} <= {o.value for o in OptimizerNames}


UNPREPARED = {
    "ADALORA": "peft=none peft.peft_type=ADALORA peft.total_step=10",
    "POLY": "peft=none peft.peft_type=poly",
    "MULTITASK_PROMPT_TUNING": METHOD.format("MULTITASK_PROMPT_TUNING"),
    "XLORA": "peft=none peft.peft_type=XLORA",
    "RANDLORA": "peft=none peft.peft_type=RANDLORA peft.target_modules=[q_proj]",
    "CPT": "peft=none peft.peft_type=CPT", "ADAPTION_PROMPT": "peft=none peft.peft_type=ADAPTION_PROMPT",
    "eva": "peft.init_lora_weights=eva", "corda": "peft.init_lora_weights=corda",
    "loftq": "peft.init_lora_weights=loftq peft.loftq_config.loftq_bits=4",
    "arrow_config": "peft.arrow_config.top_k=2", "kasa_config": "peft.kasa_config.beta=0.1",
    "monteclora_config": "peft.monteclora_config.num_samples=3",
    "megatron_config": "peft.megatron_config.a=1",
    "use_asa": "peft=none peft.peft_type=ADAMSS peft.use_asa=true",
    "custom": "peft=none peft.peft_type=SHIRA peft.mask_type=custom",
}  # fmt: skip


@pytest.mark.parametrize("name", UNPREPARED)
def test_what_nobody_prepares_is_refused(name: str, ask):
    said = ask(UNPREPARED[name])
    assert name in said.get("unprepared", ""), said


def test_nobody_makes_the_calls():
    """When one is made, by TRL or by the kit, its row goes. PEFT still has the functions under these names."""
    import peft
    from peft.tuners.adamss.asa_callback import AdamssAsaCallback
    from peft.tuners.lora import LoraModel
    from transformers import Trainer
    from trl import SFTTrainer

    kit = "".join(f.read_text() for f in Path(api.__file__).parent.joinpath("training").glob("*.py"))
    trainers = kit + inspect.getsource(SFTTrainer) + inspect.getsource(Trainer)
    assert "preprocess_corda" not in trainers  # its module imports attr, which nobody installs
    for call in (peft.AdaLoraModel.update_and_allocate, LoraModel._get_kasa_loss, LoraModel._get_monteclora_loss,
                 peft.initialize_lora_eva_weights, peft.preprocess_loraga, peft.create_arrow_model,
                 AdamssAsaCallback):  # fmt: skip
        assert call.__name__ not in trainers
    rows = {value or key for key, value, _ in effect.UNPREPARED if value is not True}
    assert rows - {"lora_ga"} <= {*UNPREPARED}  # PEFT's own annotation does not list lora_ga: refused as no choice


# ---- batch, steps, schedule ----

SCHEDULE = "deepspeed=zero2 +deepspeed.scheduler.type={} launch.num_gpus=1"
ARITHMETIC = [
    ("trainer.num_train_epochs=0", "no-steps"),
    ("trainer.num_train_epochs=-1", "no-steps"),
    ("trainer.max_steps=0", "no-steps"),
    ("trainer.max_steps=5 trainer.num_train_epochs=2", "steps-and-epochs"),
    ("trainer.accelerator_config={split_batches:true} launch.num_gpus=2", "split-batches"),
    ("trainer.accelerator_config={gradient_accumulation_kwargs:{num_steps:4}}", "split-batches"),
    ("trainer.auto_find_batch_size=true", "batch-varies"),
    (SCHEDULE.format("WarmupLR") + " trainer.lr_scheduler_type=linear", "scheduler"),
    (SCHEDULE.format("OneCycle") + " +deepspeed.scheduler.params={cycle_min_lr:0.0001,cycle_max_lr:0.001}"
     " trainer.learning_rate=1.0e-3", "scheduler"),
    (SCHEDULE.format("WarmupLR") + " trainer.learning_rate=1.0e-3", None),
    ("trainer.max_steps=5", None),
    ("trainer.num_train_epochs=0.5", None),
    ("trainer.accelerator_config={split_batches:true} launch.num_gpus=1", None),
    ("trainer.accelerator_config={even_batches:true} launch.num_gpus=2", None),
]  # fmt: skip


@pytest.mark.parametrize("line, rule", ARITHMETIC)
def test_batch_steps_and_schedule_are_those_of_the_run(line: str, rule: str | None, ask):
    said = ask(line)
    assert (rule in said) if rule else not said, said


# ---- layers_to_transform ----


def test_layers_are_counted_as_peft_counts_them():
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    names = ["model.embed_tokens", "model.norm", "transformer.h.1.attn.c_attn", "model.layers.0.mlp.gate",
             "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.experts.0.up_proj", "layers.0.q_proj"]  # fmt: skip
    for layers in (0, 1, [0, 1]):
        for pattern in (None, "layers", "h", ["h", "layers"], "experts"):
            config = LoraConfig(target_modules=[n.rpartition(".")[2] for n in names], layers_to_transform=layers,
                                layers_pattern=pattern)  # fmt: skip
            for name in names:
                assert is_in_layers(name, layers, pattern) == bool(check_target_module_exists(config, name)), name


def test_a_dropped_target_is_named(ask):
    said = ask("peft.target_modules=[q_proj,embed_tokens] peft.layers_to_transform=[0]")
    assert (
        said["layers-drop-target"].startswith("command line: peft.target_modules")
        or "embed_tokens" in said["layers-drop-target"]
    )
    assert ask("peft.target_modules=[q_proj] peft.layers_to_transform=[0]") == {}


# ---- a base that is stored quantized ----


def stored(method: str, more: str = "") -> str:
    config = f"{{model_type:llama,quantization_config:{{quant_method:{method}{more}}}}}"
    return f"model.name_or_path=some/hub model.config={config}"


STORED = [
    (stored("gptq"), None),
    (stored("awq"), None),
    (stored("fp8"), None),
    (stored("compressed-tensors"), None),
    (stored("torchao", ",quant_type:{default:{_type:Int8WeightOnlyConfig}}"), None),
    (stored("torchao", ",quant_type:{default:{_type:Int4WeightOnlyConfig}}"), "stored-quantized"),
    (stored("bitsandbytes", ",load_in_4bit:true"), None),
    (stored("bitsandbytes", ",load_in_8bit:true"), None),
    (stored("mxfp4"), "stored-quantized"),
    (stored("fp_quant"), "stored-quantized"),
    (stored("gptq") + " peft=none", "stored-quantized"),
    (stored("gptq") + " peft.init_lora_weights=pissa", "stored-quantized"),
    (stored("gptq") + " peft.use_dora=true", "stored-quantized"),
    (stored("awq") + " deepspeed=zero3 model.config.hidden_size=64", "stored-quantized"),
    (stored("hqq") + " peft=none peft.peft_type=LOKR peft.target_modules=[q_proj]", "stored-quantized"),
    (stored("gptq") + " quantization=nf4", "quantized-stored"),
    (stored("bitsandbytes", ",load_in_4bit:true") + " peft=none", "quantized-full"),
    (stored("bitsandbytes", ",load_in_4bit:true") + " peft.init_lora_weights=pissa", "quantized-peft"),
    (stored("bitsandbytes", ",load_in_4bit:true") + " deepspeed=zero3 model.config.hidden_size=64",
     "quantized-storage"),
    (stored("bitsandbytes", ",load_in_8bit:true") + " deepspeed=zero3 model.config.hidden_size=64",
     "quantized-int8-sharded"),
    (stored("mxfp4") + " model.random_init=true trainer.learning_rate=1.0e-5 peft=none", None),
]  # fmt: skip


@pytest.mark.parametrize("line, rule", STORED)
def test_what_cannot_be_done_over_stored_quantization(line: str, rule: str | None, ask):
    said = ask(line)
    assert (rule in said) if rule else not said, said


def test_the_table_is_transformers_own():
    """is_trainable of every quantizer that transformers has, asked without a model."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    trained = "bitsandbytes_4bit bitsandbytes_8bit fp8 mxfp8 gptq eetq hqq quanto sinq".split()
    by_version_or_bits = "awq aqlm compressed-tensors torchao".split()
    known = {*trained, *by_version_or_bits, *quantization.NOT_TRAINED, *quantization.TRAINED_WHERE}
    assert set(AUTO_QUANTIZER_MAPPING) == known
    for method, cls in AUTO_QUANTIZER_MAPPING.items():
        source = inspect.getsource(
            cls.is_trainable.fget if isinstance(cls.is_trainable, property) else cls.is_trainable
        )
        last = [line.strip() for line in source.splitlines() if "return" in line][-1]
        if method in quantization.NOT_TRAINED:
            assert last == "return False", method
        elif method in quantization.TRAINED_WHERE:
            assert quantization.TRAINED_WHERE[method][0] in source, method
        else:
            assert method in by_version_or_bits or last == "return True", method
