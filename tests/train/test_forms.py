"""Every data form with every kind of optimizer and tuning: one YAML file, one battery."""

import dataclasses
import functools
import itertools
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.cli import config as configs
from jaxlm.cli.main import main
from jaxlm.core.errors import UserError
from jaxlm.cost.device import Device
from jaxlm.cost.plan import dry_run
from jaxlm.models import save_pretrained
from jaxlm.peft import load_adapter
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.finetuning import FinetuneConfig, finetune
from jaxlm.train.load import load_model
from jaxlm.train.measure import TokenLossMetric
from jaxlm.train.objectives import OBJECTIVES, Completion
from tests.helpers.tiny import read_lines

DEVICE = Device(name="toy", peak_flops=1e9)
ANSWERS = {"great": "It is good.", "terrible": "It is bad."}


def conversations(folder: Path, count: int = 48) -> None:
    numbers = np.random.default_rng(0)
    words = ["the film", "this story", "that play", "a book"]
    rows, texts, pairs, tagged = [], [], [], []
    names = {"great": "B-GOOD", "terrible": "B-BAD"}
    for number in range(count):
        word = ("great", "terrible")[number % 2]
        text = f"{numbers.choice(words)} was {word} {number}"
        turns = [("user", text), ("assistant", ANSWERS[word])]
        rows.append({"messages": [{"role": role, "content": said} for role, said in turns]})
        texts.append({"text": f"{text}. {ANSWERS[word]}"})
        other = ANSWERS["great" if word == "terrible" else "terrible"]
        both = {"chosen": f" {ANSWERS[word]}", "rejected": f" {other}"}
        pairs.append({"prompt": f"{text}.", **both})
        split = text.split()
        tagged.append({"tokens": split, "tags": [names.get(each, "O") for each in split]})
    lists = (("talk", rows), ("text", texts), ("pairs", pairs), ("tags", tagged))
    for name, lines in lists:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


FORMS = {
    "messages": "messages: {train: talk.jsonl, template: plain, validation: hold_out,"
    " num_validation: 8, max_length: 32}",
    "text": "text: {train: text.jsonl, validation: hold_out, num_validation: 8, max_length: 24}",
    "pairs": "pairs: {train: pairs.jsonl, validation: hold_out, num_validation: 8}",
    "tokens": "tokens: {train: tags.jsonl, validation: hold_out, num_validation: 8,"
    " max_length: 32}\nmonitor: accuracy",
}
REST = """
peft: {peft}
optimizer: {optimizer}
steps: 6
batch_size: 4
eval_batch_size: 8
eval_every: 3
checkpoint_every: 3
log_every: 3
output: {folder}/run
"""
ADAM = "{name: adam, learning_rate: 3.0e-3}"
MEZO = "{name: mezo, learning_rate: 1.0e-3}"


def write_in(
    folder: Path, form: str = "messages", optimizer: str = ADAM, peft: str = "lora"
) -> Path:
    """Write data and a configuration, and return its path."""
    conversations(folder)
    text = FORMS[form] + REST.format(optimizer=optimizer, peft=peft, folder=folder)
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


@pytest.fixture
def write(tmp_path: Path):
    return functools.partial(write_in, tmp_path)


def load(path: Path, **overrides: str) -> FinetuneConfig:
    return configs.load(FinetuneConfig, str(path), overrides)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The run of the default row of conversations, not stopped."""
    return whole(write_in(tmp_path_factory.mktemp("trained")))


def whole(path: Path) -> Path:
    config = load(path)
    finetune(config, base_dir=path.parent)
    return Path(config.output)


LONG = """{name: lion, learning_rate: 1.0e-3, schedule: cosine, warmup: 0.2, floor: 0.1, clip: 1.0,
 groups: [{select: lora_b, learning_rate: 3.0e-3}, {select: q_proj, weight_decay: 0.1}]}"""
FREE = "{name: schedule_free_adamw, learning_rate: 3.0e-3}"
USUAL = (
    *(("messages", ADAM, "lora"), ("text", ADAM, "null"), ("messages", LONG, "lora")),
    ("tokens", ADAM, "lora"),
)
ROWS = (
    *itertools.product(FORMS, (ADAM, MEZO), ("lora", "null")),
    ("messages", LONG, "lora"),
    ("text", FREE, "null"),
)


@pytest.mark.parametrize(
    ("form", "optimizer", "peft"),
    [pytest.param(*row, marks=() if row in USUAL else pytest.mark.slow) for row in ROWS],
)
def test_a_run_measures_its_loss_and_is_planned(form, optimizer, peft, write):
    path = write(form, optimizer, peft)
    config = load(path)
    plan = dry_run(config, base_dir=path.parent, device=DEVICE)
    summary = finetune(config, base_dir=path.parent)
    metric, measured, sign = ("f1", "accuracy", -1) if form == "tokens" else ("loss", "loss", 1)
    assert (summary["task"], summary["metric"]) == (form, metric)
    found = [summary[name][measured] for name in ("zero_shot", "validation", "test")]
    losses = [sign * found[0], sign * found[2]]
    assert losses[1] == sign * found[1] <= losses[0]
    if optimizer != MEZO:
        assert losses[1] < losses[0] - 0.01
    assert plan.memory[0].peak == summary["peak_memory_bytes"] or plan.memory[1].peak
    # What a checkpoint holds is what is trained, and the moments of Adam.
    stored = Checkpoints(config.output + "/checkpoints", read_only=True)
    held = stored.read(6, "params")["params"]
    kept = {"layers"} if peft == "lora" else {"embed", "final_norm", "layers"}
    assert set(held) == kept | ({"classifier"} if form == "tokens" else set())
    assert (summary["checkpoint_bytes"] < 1_000_000) == (peft == "lora")
    lm = load_model(config.output)
    assert finetune(config, base_dir=path.parent) == summary
    adapter = "lora_a" in lm.params["layers"]["attention"]["q_proj"]
    assert adapter == (peft == "lora")


@pytest.mark.parametrize(
    "form", ["messages", *(pytest.param(x, marks=pytest.mark.slow) for x in ("text", "tokens"))]
)
def test_epochs_in_micro_batches_are_the_steps_of_the_batch(form, write, trained):
    """40 rows in batches of 4: 3/5 of an epoch are 6 steps."""
    path = write(form)
    parts = load(
        path, steps="null", epochs="0.6", accumulate="4", output=str(path.parent / "parts")
    )
    if form == "messages":
        config = load(path, steps="null", epochs="0.6")
        plan = dry_run(config, base_dir=path.parent, device=DEVICE)
        assert plan.steps == 6
        finetune(config, base_dir=path.parent)
        assert finetune(config, base_dir=path.parent)["config"]["steps"] == 6
        one, other = (read_lines(run / "metrics.jsonl") for run in (path.parent / "run", trained))
        assert one == other
        least = dry_run(parts, base_dir=path.parent, device=DEVICE)
        assert least.memory[0].temporaries < plan.memory[0].temporaries
        assert least.flops.products == plan.flops.products
    else:
        trained = whole(path)
    finetune(parts, base_dir=path.parent)
    one, other = (read_lines(run / "metrics.jsonl") for run in (path.parent / "parts", trained))
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(*([*x.values()] for x in (a, b)), rtol=1e-4)


@pytest.mark.parametrize(
    "optimizer", [ADAM, pytest.param(MEZO, marks=pytest.mark.slow)], ids=["adam", "mezo"]
)
def test_a_run_without_progress_stops_early_and_there_again(optimizer, write, monkeypatch):
    path = write("messages", optimizer.replace("e-3", "e-30"))
    config = load(path, patience="2", steps="30", peft="null")
    save = Checkpoints.save

    def stopping(self, step, *rest):
        save(self, step, *rest)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            finetune(config, base_dir=path.parent)
    summary = finetune(config, base_dir=path.parent)
    assert (summary["steps"], summary["tested_step"], summary["stopped_early"]) == (6, 0, True)
    assert summary["forwards"] == 6 * (2 if optimizer == MEZO else 1)
    folder = Path(config.output)
    assert finetune(config, base_dir=path.parent) == summary
    (folder / "summary.json").unlink()
    again = finetune(config, base_dir=path.parent)
    assert (again["steps"], again["test"]) == (6, summary["test"])
    if optimizer == MEZO:
        shutil.rmtree(folder / "checkpoints")
        load_model(folder)


def test_float32_parameters_are_the_master_weights_of_bfloat16(write):
    path = write()
    losses = []
    for dtype in ("bf16", "null"):
        config = load(
            path, compute_dtype=dtype, peft="null", steps="3", output=f"{path.parent}/{dtype}"
        )
        summary = finetune(config, base_dir=path.parent)
        held = Checkpoints(config.output + "/checkpoints", read_only=True).read(3)
        floats = [x for x in jax.tree.leaves(held) if np.issubdtype(x.dtype, np.inexact)]
        assert {str(x.dtype) for x in floats} == {"float32"}  # Adam's moments, too
        losses.append(summary["test"]["loss"])
        assert load_model(config.output).config.compute_dtype == config.compute_dtype
    np.testing.assert_allclose(*losses, rtol=0.02)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("optimizer", [ADAM, pytest.param(MEZO, marks=pytest.mark.slow)])
def test_packed_rows_are_trained_on_and_planned(optimizer, write):
    path = write(optimizer=optimizer)
    config = load(path, **{"messages.packing": "true"})
    plan = dry_run(config, base_dir=path.parent, device=DEVICE)
    summary = finetune(config, base_dir=path.parent)
    assert plan.memory[0].peak == summary["peak_memory_bytes"] or plan.memory[1].peak
    assert plan.tokens == config.messages.max_length
    assert summary["test"]["loss"] <= summary["zero_shot"]["loss"]


def test_the_metric_of_an_objective_chooses_the_checkpoint(write, monkeypatch):
    class Negative(TokenLossMetric):
        main, mode = "likelihood", "max"

        def __call__(self, split, params):
            return {"likelihood": -super().__call__(split, params)["loss"]}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Likelihood(Completion):
        name: str = "likelihood"

        def metric(self, lm, data, encoded, *, batch_size, reduction="mean"):
            return Negative(lm, encoded, batch_size=batch_size)

    monkeypatch.setitem(OBJECTIVES, "likelihood", Likelihood)
    path = write()
    summary = finetune(load(path, objective="likelihood"), base_dir=path.parent)
    values = [
        row["validation_likelihood"]
        for row in read_lines(Path(summary["config"]["output"], "metrics.jsonl"))
        if "validation_likelihood" in row
    ]
    assert summary["metric"] == "likelihood"
    assert summary["validation"]["likelihood"] == max(values) == summary["test"]["likelihood"]


def test_a_finished_run_needs_its_data_no_more(write):
    path = write()
    config = load(path, steps="1")
    summary = finetune(config, base_dir=path.parent)
    (path.parent / "talk.jsonl").unlink()
    assert finetune(config, base_dir=path.parent) == summary


def test_a_run_tells_which_rows_it_leaves_out(write):
    path = write()
    turns = [("user", "word " * 100), ("assistant", "It is good.")]
    row = {"messages": [{"role": role, "content": said} for role, said in turns]}
    with open(path.parent / "talk.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    config = load(path, steps="1")
    finetune(config, base_dir=path.parent)
    log = Path(config.output, "log.txt").read_text()
    assert re.search(r"left out 1 (train|validation) rows, .* the first talk.jsonl:49\n", log)


@pytest.mark.parametrize(
    ("form", "optimizer"),
    [
        ("messages", ADAM),
        pytest.param("messages", MEZO, marks=pytest.mark.slow),
        pytest.param("tokens", MEZO, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_resumes_bitwise(
    form, optimizer, write, trained, tmp_path_factory, monkeypatch
):
    path = write(form, optimizer)
    if optimizer != ADAM:
        trained = whole(write_in(tmp_path_factory.mktemp("whole"), form, optimizer))
    save = Checkpoints.save

    def stopping(self, step, *rest):
        save(self, step, *rest)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            finetune(load(path), base_dir=path.parent)
    finetune(load(path), base_dir=path.parent)
    one, other = (
        Checkpoints(run / "checkpoints", read_only=True).read(6)
        for run in (path.parent / "run", trained)
    )
    assert json.dumps(one, default=lambda x: x.tolist()) == json.dumps(
        other, default=lambda x: x.tolist()
    )


def test_the_adapter_of_a_run_is_a_peft_folder(trained, tmp_path):
    target = tmp_path / "adapter"
    assert main(["convert", str(trained), str(target), "--adapter"]) == 0
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        p.name for p in target.iterdir()
    }
    adapted, base = load_model(trained), load_model(None)
    again = load_adapter(base, target)
    ids = np.arange(24, dtype=np.int32).reshape(2, 12) + 5
    logits = [lm.apply(lm.params, ids) for lm in (adapted, again, base)]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-6)
    assert np.abs(logits[0] - logits[2]).max() > 1e-3


def test_other_weights_below_the_adapters_are_refused(write, tmp_path):
    path = write()
    save_pretrained(load_model(None), tmp_path / "model")
    config = load(path, model=str(tmp_path / "model"))
    finetune(config, base_dir=path.parent)
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1  # the lowest bits of a number
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"^model: has changed since the run in .* .got .*/model."):
        load_model(config.output)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": "subj"},
            r"^.*task: a run must have one of task, messages, text, pairs, tokens, forget ",
        ),
        ({"objective": "classification"}, r"objective: classification reads task .got messages"),
        ({"calibrate": "true"}, r"calibrate: needs the same options in every example"),
        ({"epochs": "2"}, r"epochs: cannot be given together with steps .got 2.0 and 6.. Drop"),
        (
            {"patience": "3", "messages.validation": "null", "messages.num_validation": "null"},
            r"^patience: counts evaluations, and there are no validation rows .got 3",
        ),
        ({"monitor": "f1"}, r"^monitor: not known .got 'f1'.. Choose one of loss"),
        ({"accumulate": "3"}, r"accumulate: must divide the batch size, 4 .got 3"),
        ({"compute_dtype": "auto"}, r"compute_dtype: not known .got 'auto'"),
        ({"optimizer.learning_rat": "1"}, r"Did you mean optimizer.learning_rate"),
        ({"optimizer.groups": "[{select: norm}]"}, r"groups.0..select: selects none"),
        ({"messages.train": "null"}, r"messages: has no data|messages.num_validation"),
    ],
)
def test_what_does_not_go_together(changes, message, write):
    path = write()
    with pytest.raises(UserError, match=message):
        finetune(load(path, **changes), base_dir=path.parent)
