"""A dry run: what it says before is what a run takes, whatever the model and wherever it lies."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from benchmarks.common import fresh_peak, resident_bytes
from jaxlm.cli import config as configs
from jaxlm.cli.main import main
from jaxlm.core.errors import UserError
from jaxlm.cost.by_shapes import finetuning
from jaxlm.cost.device import Device, this_device
from jaxlm.cost.flops import count_flops
from jaxlm.cost.plan import dry_run, largest_batch
from jaxlm.models import param_shapes
from jaxlm.sharding import make_mesh
from jaxlm.train.dynamics import method_and_batches
from jaxlm.train.finetuning import FinetuneConfig, build, finetune, read_data
from jaxlm.train.load import load_model
from jaxlm.train.pretraining import PretrainConfig, pretrain
from tests.helpers.tiny import write_corpus

pytestmark = pytest.mark.optimized

ADAM = {"optimizer.name": "adam"}
LORA = ADAM | {"peft.name": "lora", "peft.rank": 2}
TOY = Device(name="toy", peak_flops=1e12, cpu=True)  # no memory: no search for a batch size


def load(path: Path, **overrides) -> FinetuneConfig:
    flags = {key: str(value) for key, value in overrides.items()}
    return configs.load(FinetuneConfig, path, flags)


def plan_of(path: Path, **changes):
    return dry_run(load(path, **LORA, **changes), base_dir=path.parent, device=TOY)


@pytest.mark.parametrize(
    "changes", [LORA, pytest.param({}, marks=pytest.mark.slow)], ids=["lora", "mezo"]
)
def test_memory_is_that_of_the_run_to_the_byte(changes, run_yaml):
    config = load(run_yaml, steps=4, eval_every=4, **changes)
    plan = dry_run(config, base_dir=run_yaml.parent, device=TOY)
    assert [each.program for each in plan.memory] == ["training", "evaluation"]
    assert not Path(config.output).exists()
    summary = finetune(config, base_dir=run_yaml.parent)
    assert summary["peak_memory_bytes"] == max(each.peak - each.held for each in plan.memory)
    assert plan.largest_batch is None
    assert plan.host_bytes >= plan.state_bytes + plan.checkpoint_bytes > plan.state_bytes


@pytest.fixture(scope="module")
def pretrain_yaml(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    write_corpus(folder)
    model = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
    values = {
        "model": model | {"max_positions": 16},
        "tokenizer": str(folder / "tokenizer"),
        "corpus": {
            "path": str(folder / "corpus"),
            "domains": [{"name": "films", "weight": 1}, {"name": "more", "weight": 1}],
            "held_out": "held_out/films",
        },
        "optimizer": {"name": "adamw"},
        "steps": 2,
        "batch_size": 4,
        "seq_len": 8,
        "log_every": 2,
        "eval_every": 2,
        "checkpoint_every": 2,
        "output": str(folder / "run"),
    }
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(values))
    return folder / "pretrain.yaml"


def test_pretraining(pretrain_yaml):
    config = configs.load(PretrainConfig, pretrain_yaml)
    plan = dry_run(config, device=TOY)
    summary = pretrain(config)
    assert summary["peak_memory_bytes"] == plan.memory[0].peak
    assert summary["parameters"] == plan.num_parameters == plan.num_trained
    assert plan.state_bytes == 3 * 4 * plan.num_parameters + 4  # moments, and their count
    for options in ({"param_dtype": "bfloat16"}, {"param_dtype": "float32", "bits": 8}):
        real = load_model(config.output, **options).params
        planned = load_model(config.output, **options, shapes_only=True).params
        shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), p) for p in (real, planned)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_of_mezo_is_two_passes_forward(compiled, run_yaml):
    config = load(run_yaml)
    run = finetuning(config, base_dir=run_yaml.parent)
    state, batches = run.dispatch().args
    rows, length = batches["input_ids"].shape[1:]
    model = load_model(config.model).config
    kernels = {path: shape for path, shape in param_shapes(model).items() if "kernel" in path}
    weights = sum(int(np.prod(shape)) for shape in kernels.values())
    attention = 2 * 2 * rows * model.num_layers * model.num_heads * model.head_size * length**2
    head = 2 * rows * 2 * model.hidden_size  # two label words, at one place of each row
    forward = 2 * rows * length * weights + attention + head
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batches)
    step = run.make(config.batch_size)[0].step
    assert count_flops(step, state.params, state.opt_state, one).products == 2 * forward
    if not compiled:
        return
    plan = dry_run(config, base_dir=run_yaml.parent, device=TOY)
    assert plan.flops.products == 2 * forward
    assert plan.costs.products == plan.dispatch * plan.flops.products
    assert plan.seconds == {"products": plan.flops.products / (0.4 * 1e12)}
    weight_bytes = plan.dispatch * 4 * plan.num_parameters
    assert plan.costs.bytes > 4 * weight_bytes  # read forward, read and written by the update


STATES = {
    "mezo in bfloat16": {"param_dtype": "bfloat16"},
    "mezo with momentum": {"optimizer.name": "mezo_momentum"},
    "lora": LORA,
    "prefix": ADAM | {"peft.name": "prefix"},
    "bits": {"bits": 4},
    "svag": ADAM | {"dynamics.name": "svag", "dynamics.l": 2},
    "noise": ADAM | {"dynamics.name": "noise", "dynamics.parts": 2},
    "local": ADAM | {"dynamics.name": "local", "dynamics.workers": 2},
    "a mesh": ADAM | {"mesh": (2, 2, 2)},
}


@pytest.mark.multidevice
@pytest.mark.parametrize("case", STATES)
def test_the_state_and_the_batches_are_as_they_will_be(case, run_yaml):
    changes = dict(STATES[case])
    sizes = changes.pop("mesh", None)
    mesh = None if sizes is None else make_mesh(*sizes)
    config = load(run_yaml, **changes)
    run = finetuning(config, base_dir=run_yaml.parent, mesh=mesh)
    state, batches = run.dispatch().args

    lm = load_model(config.model, param_dtype=config.param_dtype, bits=config.bits, mesh=mesh)
    setting = build(config, lm, read_data(config, base_dir=run_yaml.parent), mesh=mesh)
    config, params, encoded = setting.config, setting.lm.params, setting.encoded
    method, read = method_and_batches(
        config.optimizer,
        config.dynamics,
        lambda *args, **options: None,
        lambda size, seeds: (
            lambda first, count: encoded.streams(first, count, batch_size=size, seeds=seeds)
        ),
        steps=config.steps,
        batch_size=config.batch_size,
        seed=0,
        mesh=mesh,
    )
    real = method.start(params, jax.random.key(0))

    def described(leaf):
        placed = getattr(leaf, "sharding", None)
        placed = placed.shard_shape(leaf.shape) if placed is not None else leaf.shape
        return leaf.shape, leaf.dtype, placed

    assert jax.tree.map(described, state) == jax.tree.map(described, real)
    first = next(config.dispatches(0))
    shapes = {key: (value.shape, value.dtype) for key, value in read(*first).items()}
    assert {key: (value.shape, value.dtype) for key, value in batches.items()} == shapes


@pytest.mark.multidevice
def test_on_a_mesh_all_is_of_one_device(run_yaml):
    mesh = make_mesh(data=2, fsdp=2, model=2)
    config = load(run_yaml, **ADAM)
    plan = dry_run(config, base_dir=run_yaml.parent, mesh=mesh, device=TOY)
    alone = dry_run(config, base_dir=run_yaml.parent, device=TOY)
    found = {each.path: each for each in plan.parameters}
    kernel = found["layers.mlp.up_proj.kernel"]
    assert (kernel.spec, kernel.bytes) == ("-, fsdp, model", 4 * 2 * 16 * 32 // 4)
    assert found["final_norm.scale"].bytes == 4 * 16
    assert plan.devices == 8
    assert alone.state_bytes / 4 < plan.state_bytes < alone.state_bytes / 2
    assert plan.checkpoint_bytes == alone.checkpoint_bytes
    assert alone.moved == 0
    # Gradients of what a device has are summed over the two copies: at least so much is sent.
    assert plan.moved > sum(each.bytes for each in plan.parameters)
    assert plan.flops == alone.flops
    assert alone.flops.products / 8 <= plan.device_flops < alone.flops.products


OPT_13B = {
    "model_type": "opt",
    "activation_function": "relu",
    "hidden_size": 5120,
    "word_embed_proj_dim": 5120,
    "ffn_dim": 20480,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
    "do_layer_norm_before": True,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}


def shapes_of_13b(folder: Path, **changes) -> FinetuneConfig:
    (folder / "config.json").write_text(json.dumps(OPT_13B))
    flags = {"model": str(folder), "task.name": "subj", "param_dtype": "bfloat16"}
    return load(None, **flags | {"output": folder / "run"} | changes)


@pytest.mark.slow
def test_thirteen_billion_parameters_are_planned_in_little_memory(tmp_path):
    config = shapes_of_13b(tmp_path, **{"task.max_length": 64})
    before = fresh_peak()
    run = finetuning(config)
    call = run.dispatch()
    use = call.compile(cpu=False).memory_analysis()
    assert resident_bytes() - before < 2e9
    params = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    assert params == 12_853_473_280
    assert 0 <= use.argument_size_in_bytes - 2 * params < 1e6
    assert use.alias_size_in_bytes >= 2 * params
    assert use.temp_size_in_bytes < 0.15 * 2 * params
    assert call.args[1]["input_ids"].shape == (10, 16, 64)


def test_without_a_tokenizer_rows_are_as_long_as_they_may_be(tmp_path):
    def read(**changes):
        return finetuning(shapes_of_13b(tmp_path, **changes)).dispatch().args[1]

    assert read()["input_ids"].shape == (10, 16, 2048)
    assert read(**{"task.max_length": 3000})["input_ids"].shape == (10, 16, 2048)
    written = read(**{"task.name": "opt/squad", "batch_size": 4})
    assert written["weights"].shape == written["input_ids"].shape == (10, 4, 2048)
    with pytest.raises(UserError, match="has no tokenizer"):
        read(**{"task.name": "opt/squad", "objective": "f1"})


def test_the_length_of_texts_is_asked_for_where_a_model_reads_long_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.cost.by_shapes.LONG", 2047)
    with pytest.raises(UserError, match=r"^task.max_length: is needed, .* up to 2,048 tokens"):
        finetuning(shapes_of_13b(tmp_path))
    known = finetuning(shapes_of_13b(tmp_path, **{"task.max_length": 64})).dispatch()
    assert known.args[1]["input_ids"].shape == (10, 16, 64)


def test_a_run_is_planned_from_another_one(run_yaml):
    config = load(run_yaml, steps=2, eval_every=2, **LORA)
    finetune(config, base_dir=run_yaml.parent)
    again = finetuning(
        load(run_yaml, model=config.output, output=run_yaml.parent / "second"),
        base_dir=run_yaml.parent,
    )
    real = load_model(config.output).params
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), real)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), again.params) == shapes


CURVES = {
    "a line": (lambda n: 1000 + 7 * n, 1),
    "a line, in eights": (lambda n: 1000 + 7 * n, 8),
    "a corner": (lambda n: 1000 + max(200, 7 * n), 1),
    "in blocks": (lambda n: 1000 + 7 * (-(-n // 16) * 16), 1),
    "too much": (lambda n: 30_000 + n, 1),
    "less than the configuration's": (lambda n: 1000 + 7000 * n, 1),
}


@pytest.mark.parametrize("case", CURVES)
def test_the_largest_batch_is_found_in_few_compilations(case):
    (memory, unit), asked = CURVES[case], []

    def peak_bytes(size):
        asked.append(size)
        return memory(size)

    found = largest_batch(peak_bytes, 20_000.0, first=16, unit=unit)
    fitting = [size for size in range(unit, 10_000, unit) if memory(size) <= 20_000]
    best = max(fitting, default=0)
    assert found in (0, *fitting)
    assert best - 16 < found <= best if case == "in blocks" else found == best
    assert len(asked) <= 5


def test_the_command_writes_a_plan_and_nothing_else(run_yaml, capsys):
    before = sorted(run_yaml.parent.rglob("*"))
    rates = ["--device.name=toy", "--device.peak_flops=1e9", "--device.bandwidth=1e9"]
    rates += [f"--{name}={value}" for name, value in LORA.items()]
    assert main(["finetune", str(run_yaml), "--dry-run", *rates]) == 0
    said = capsys.readouterr().out
    assert sorted(run_yaml.parent.rglob("*")) == before
    assert "5,904 parameters, 256 of them trained; 8 examples of at most 8 tokens in a step" in said
    assert "| layers.mlp.up_proj.kernel      | 2 x 16 x 32 | float32 | whole" in said
    for word in ("training", "evaluation", "matrix products", "Expected: "):
        assert word in said


def test_rates_of_devices():
    known = Device(name="H200", memory=100e9)
    assert (known.memory, known.peak_flops, known.flops) == (100e9, 989e12, 0.4 * 989e12)
    here = this_device()
    assert here.cpu
    assert here.utilisation == 1
    assert min(here.flops, here.bandwidth, here.memory) > 1e8
    with pytest.raises(UserError, match=r"device.memory: must be above 0 .got -1.0.. Correct it."):
        Device(memory=-1.0)


def test_a_run_that_does_not_fit_names_the_largest_batch(run_yaml, monkeypatch, capsys):
    """What fits is found by the plan, whose peaks are those of runs; see above."""
    peaks = {size: plan_of(run_yaml, batch_size=size).peak_bytes for size in (4, 16)}
    room = (peaks[4] + peaks[16]) / 2

    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

    monkeypatch.setattr("jaxlm.train.finetuning.finetune", fail)
    device = Device(name="toy", peak_flops=1e12, memory=room, cpu=True)
    monkeypatch.setattr("jaxlm.cost.plan.this_device", lambda: device)
    args = ["finetune", str(run_yaml), *(f"--{k}={v}" for k, v in LORA.items())]
    assert main([*args, "--batch_size=16"]) == 2
    said = capsys.readouterr().err
    assert re.search(
        r"error: batch_size: .* \(got 16 examples .* asked for 99 bytes at once\)", said
    )
    most = int(re.search(r"is (\d+): lower batch_size", said)[1])
    assert 4 <= most < 16
    assert plan_of(run_yaml, batch_size=most).peak_bytes <= room
    assert plan_of(run_yaml, batch_size=most + 1).peak_bytes > room
    assert f"accumulate to {-(-16 // most)} or more" in said
    assert main([*args, "--batch_size=2"]) == 2  # this would fit, so others have the memory
    assert "Lower batch_size or task.max_length" in capsys.readouterr().err
