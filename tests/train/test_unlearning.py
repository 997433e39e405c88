"""The objective `unlearn`: its loss against functions of whole rows, its data, and runs of it."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import unlearning
from jaxlm.cli import config as configs
from jaxlm.cost.device import Device
from jaxlm.cost.plan import dry_run
from jaxlm.data import ForgetConfig
from jaxlm.sharding import make_mesh
from jaxlm.train import finetuning
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.finetuning import FinetuneConfig, finetune
from jaxlm.train.load import load_model
from jaxlm.train.objectives.unlearning import REFERENCE
from jaxlm.unlearning import FORGET, RETAIN, TokenScores
from tests.helpers.sentences import refused
from tests.helpers.tiny import make_model, make_tokenizer, read_lines, sentences, write_jsonl

YAML = """\
model: {model}
forget:
  train: forget.jsonl
  retain: retain.jsonl
  validation: other.jsonl
  template: plain
  refusals: [" it was the", " film"]
objective: {{name: unlearn, loss: {{name: npo, beta: 0.5}}}}
optimizer: {{name: adam, learning_rate: 1.0e-2}}
steps: 6
batch_size: 4
eval_batch_size: 8
eval_every: 3
checkpoint_every: 3
log_every: 1
output: {folder}/run
"""


def questions(first: int, last: int) -> list[dict]:
    rows = sentences(last)[first:]
    answers = (" good film", " bad film it was")
    return [{"question": f"{row['text']} it was", "answer": answers[row["label"]]} for row in rows]


def write(folder: Path, model: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, places in {"forget": (0, 8), "retain": (8, 20), "other": (20, 26)}.items():
        write_jsonl(folder / f"{name}.jsonl", questions(*places))
    path = folder / "run.yaml"
    path.write_text(YAML.format(model=model, folder=folder))
    return path


def load(path: Path, **changes: str) -> FinetuneConfig:
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return configs.load(FinetuneConfig, str(path), changes)


def run(path: Path, mesh=None, **changes: str):
    return finetune(load(path, **changes), base_dir=path.parent, mesh=mesh)


def lines(path: Path) -> list[dict]:
    return read_lines(path.parent / "run" / "metrics.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<s>"
    return make_model(tmp_path_factory.mktemp("models") / "forget", tokenizer, scale=3)


@pytest.fixture
def path(tmp_path, model) -> Path:
    return write(tmp_path / "here", model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model) -> Path:
    path = write(tmp_path_factory.mktemp("trained"), model)
    run(path)
    return path


def built(path: Path, **changes: str):
    config = load(path, **changes)
    data = finetuning.read_data(config, base_dir=path.parent)
    return finetuning.build(config, load_model(config.model), data)


def first_batch(setting):
    """The first batch, with the columns of the run."""
    _, lm, objective, _, encoded = setting
    columns = objective.columns(lm, lm, encoded, batch_size=8)
    encoded = dataclasses.replace(encoded, columns=columns)
    return encoded.batch(0, batch_size=4, seed=0)


def whole_rows(lm, params, batch, prefix, layer=None):
    """The scores of all tokens of rows by logits of every place; others than targets are masked."""
    ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
    logits = lm.apply(params, ids, mask)[:, :-1]
    scored = np.zeros(ids.shape, np.float32)
    rows, columns = np.nonzero(batch[f"{prefix}target_mask"])
    scored[rows, batch[f"{prefix}positions"][rows, columns]] = 1
    log_probs = jax.nn.log_softmax(logits)
    log_probs = jnp.take_along_axis(log_probs, jnp.asarray(ids)[:, 1:, None], axis=-1)[..., 0]
    states = None if layer is None else lm.hidden(params, ids, mask, layer=layer)[:, :-1]
    return TokenScores(log_probs, scored[:, :-1], ids[:, 1:], logits, states)


FAST = [
    ("npo", "nll"),
    ("undial", "kl"),
    ("{name: rmu, layer: 1}", "{name: hidden, layer: 1, weight: .3}"),
    ("flat", "null"),
]
SLOW = [
    ("[{name: npo, beta: .2, weight: .5}, {name: ga, weight: 2}]", "[nll, kl]"),
    *((name, "nll") for name in FORGET if name not in ("npo", "undial", "rmu", "flat")),
]


@pytest.mark.parametrize(
    ("loss", "retain"), [*FAST, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_the_loss_and_its_gradient_are_those_of_whole_rows(path, loss, retain):
    setting = built(path, objective__loss=loss, objective__retain=retain)
    lm, objective = setting.lm, setting.objective
    batch = first_batch(setting)
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), lm.params
    )

    def expected(params):
        def both(prefix, layer):
            pair = [whole_rows(lm, p, batch, prefix, layer) for p in (params, lm.params)]
            if prefix == "" and "alternative_input_ids" in batch:
                others = [whole_rows(lm, p, batch, "alternative_") for p in (params, lm.params)]
                pair = [a._replace(alternative=b) for a, b in zip(pair, others, strict=True)]
            return pair

        total = 0.0
        for terms, prefix in ((objective.loss, ""), (objective.kept, "retain_")):
            for term in terms:
                scores = both(prefix, term.layer_of_states)
                total += term.weight * jnp.mean(term(*scores))
        return total

    loss_fn = setting.loss_fn(None)
    value, grads = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, batch)[0]))(params)
    wanted, slopes = jax.jit(jax.value_and_grad(expected))(params)
    np.testing.assert_allclose(value, wanted, rtol=2e-5)
    for one, other in zip(*map(jax.tree.leaves, (grads, slopes)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * max(1, float(jnp.abs(other).max())))


def test_a_step_reads_as_many_rows_to_keep_and_the_same_whenever_it_runs(path):
    encoded = built(path).encoded
    batches = [encoded.batch(step, batch_size=4, seed=3) for step in range(6)]
    kept = np.concatenate([batch["retain_input_ids"] for batch in batches])
    known = {tuple(row.ids) for row in encoded.retain.rows}
    seen = [tuple(row[row > 0].tolist()) for row in kept]
    assert len(known) > 4
    assert {*seen[:12]} <= known
    assert len(encoded.retain) == 12
    assert sorted(seen[:12]) == sorted(tuple(row.ids) for row in encoded.retain.rows)  # an epoch
    later = encoded.batches(4, 2, batch_size=4, seed=3)
    for key, value in later.items():
        np.testing.assert_array_equal(value[1], batches[5][key], err_msg=key)
    for prefix in ("", "retain_"):
        batch = batches[0]
        targets = batch[f"{prefix}target_mask"].sum()
        np.testing.assert_allclose(batch[f"{prefix}per_target"], 4 / targets)


def test_micro_batches_are_the_batch(path):
    settings = [built(path, accumulate=count, objective__loss="[npo, ga]") for count in ("1", "4")]
    batch, found = first_batch(settings[0]), []
    for setting in settings:
        loss_fn, params = setting.loss_fn(None), setting.lm.params
        found.append(jax.jit(jax.value_and_grad(lambda p, f=loss_fn: f(p, batch)[0]))(params))
    (value, grads), (expected, wanted) = found
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for one, other in zip(*map(jax.tree.leaves, (grads, wanted)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_run_forgets_and_keeps(trained):
    rows = [row for row in lines(trained) if "validation_forget_loss" in row]
    summary = json.loads((trained.parent / "run" / "summary.json").read_text())
    first = summary["zero_shot"]
    assert rows[-1]["validation_forget_loss"] > first["forget_loss"]
    assert summary["metric"] == "forget_loss"
    assert (
        summary["tested_step"] == max(rows, key=lambda row: row["validation_forget_loss"])["step"]
    )
    first_loss = next(row["loss"] for row in lines(trained) if "loss" in row)
    start = 2 / 0.5 * np.log(2)  # npo, where both models are the same
    kept = next(row["retain"] for row in lines(trained) if "retain" in row)
    np.testing.assert_allclose(first_loss, start + kept, rtol=1e-5)
    lm, encoded = load_model(load(trained).model), built(trained).encoded
    losses = []
    for row in encoded.retain.rows:
        log_probs = lm.log_probs(lm.params, np.array([row.ids]))[0]
        losses += [-float(log_probs[place - 1]) for place in row.loss_positions]
    np.testing.assert_allclose(first["retain_loss"], np.mean(losses), rtol=1e-5)


def test_a_stopped_run_resumes_bitwise(path, trained, monkeypatch):
    """The reference is the model that the run began with, also when it resumes."""
    changes = {"objective__loss": "[npo, undial]"}
    whole = write(path.parent / "whole", Path(load(path).model))
    run(whole, **changes)
    save = Checkpoints.save

    def stopping(self, step, *rest):
        save(self, step, *rest)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(path, **changes)
    run(path, **changes)
    assert lines(path) == lines(whole)
    for one, other in zip(
        *(jax.tree.leaves(load_model(x.parent / "run").params) for x in (path, whole)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_run_goes_on_by_the_same_names_but_not_with_other_rows(path):
    run(path, steps="1")
    assert run(path, steps="2")["steps"] == 2
    rows = read_lines(path.parent / "retain.jsonl")
    write_jsonl(path.parent / "retain.jsonl", rows[1:])
    with refused("forget.retain", "has changed since the run"):
        run(path, steps="3")


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("loss", ["npo", "undial"])
def test_a_mesh_has_the_curves_of_one_device(path, tmp_path, model, loss):
    other = write(tmp_path / "other", model)
    run(path, objective__loss=loss)
    run(other, mesh=make_mesh(data=2, fsdp=2, model=2), objective__loss=loss)
    for new, old in zip(lines(other), lines(path), strict=True):
        for name, value in old.items():
            np.testing.assert_allclose(new[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "{name: mezo, learning_rate: 1e-3}"},
        {"peft": "lora", "objective__loss": "undial"},
    ],
)
def test_forward_passes_alone_or_adapters_forget(path, changes):
    summary = run(path, steps="3", **changes)
    assert summary["test"]["forget_loss"] != summary["zero_shot"]["forget_loss"]


def test_a_checkpoint_is_kept_by_a_metric_that_is_named(path):
    summary = run(path, monitor="retain_loss", objective__loss="ga")
    rows = [row for row in lines(path) if "validation_retain_loss" in row]
    best = min(rows, key=lambda row: row["validation_retain_loss"])
    assert summary["tested_step"] == best["step"]
    assert summary["validation"] == {"retain_loss": best["validation_retain_loss"]}


def test_documents_are_forgotten_in_pieces(path):
    for name in ("forget", "retain", "other"):
        rows = read_lines(path.parent / f"{name}.jsonl")
        texts = [{"text": f"{row['question']}{row['answer']}"} for row in rows]
        write_jsonl(path.parent / f"{name}.jsonl", texts)
    setting = built(path, forget__max_length="6", objective__loss="ga")
    assert setting.encoded.alternative is None
    assert max(len(row.ids) for row in setting.encoded.train.rows) == 6
    scored = sum(len(row.loss_positions) for row in setting.encoded.train.rows)
    texts = [example.text for example in setting.data.train]
    tokens = setting.lm.tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert scored == sum(len(ids) + 1 for ids in tokens)  # the end of a text, too
    run(path, forget__max_length="6", objective__loss="ga", steps="1")


@pytest.mark.parametrize("loss", ["npo", "{name: undial}"])
def test_a_run_is_planned(path, loss):
    plan = dry_run(
        load(path, objective__loss=loss),
        base_dir=path.parent,
        device=Device(name="toy", peak_flops=1e9),
    )
    assert plan.steps == 6


def test_without_rows_to_keep(path):
    config = {"forget__retain": "null", "objective__retain": "null", "objective__loss": "ga"}
    config["forget__validation"] = "null"
    summary = run(path, steps="1", **config)
    assert summary["test"].keys() == {"forget_loss", "loss"}
    (path.parent / "run").rename(path.parent / "first")
    config = {"objective__retain": "null", "objective__loss": "ga", "monitor": "retain_loss"}
    summary = run(path, steps="1", **config)
    assert summary["test"].keys() == {"forget_loss", "loss", "retain_loss"}
    config["forget__validation"] = "null"  # the rows to keep are measured once, for both names
    setting = built(path, **config)
    losses = setting.metric()("validation", setting.lm.params)
    assert losses["loss"] == losses["retain_loss"] != losses["forget_loss"]
    batch = setting.encoded.batch(0, batch_size=2, seed=0)
    assert not any(key.startswith("retain_") for key in batch)


@pytest.mark.parametrize(
    ("changes", "key", "part"),
    [
        ({"forget.retain": "null"}, "objective.retain", "nll needs rows to keep"),
        ({"objective.loss": "npoo"}, "objective.loss.name", "Did you mean npo?"),
        ({"objective.retain": "kll"}, "objective.retain.name", "Did you mean kl?"),
        ({"objective.loss": "{beta: 0}"}, "objective.loss.beta", "above 0"),
        ({"objective.loss": "ceu", "accumulate": "2"}, "accumulate", "ceu needs the whole batch"),
        ({"objective.loss": "{name: pdu, variant: released}"}, "objective.loss.variant", "pdu"),
        ({"objective.retain": "{name: kl, variant: released}"}, "objective.retain.variant", "kl"),
        ({"patience": "2"}, "patience", "needs a value to watch"),
        ({"objective": "completion"}, "objective", "reads task or messages or text (got forget)"),
        ({"forget.retain": "forget.jsonl"}, "forget.retain", "8 of its rows are to be forgotten"),
        ({"forget.refusals": "[]"}, "forget.refusals", "empty"),
        ({"forget.packing": "true", "forget.max_length": "16"}, "forget.packing", "one by one"),
        ({"forget.train": "none.jsonl"}, "forget.train", "no such file"),
    ],
)
def test_what_does_not_go_together(path, changes, key, part):
    with refused(key, part):
        run(path, **changes)
    assert not (path.parent / "run").exists()


def test_a_layer_that_the_model_does_not_have(path):
    with refused("objective.loss.layer", "at most 2, the layers of the model (got 8)"):
        run(path, objective__loss="rmu")
    with refused("objective.loss.layer", "must be the same"):
        run(path, objective__loss="[{name: rmu, layer: 1}, {name: rmu, layer: 2}]")


def test_refusals_need_answers(path):
    for name in ("forget", "retain", "other"):
        rows = read_lines(path.parent / f"{name}.jsonl")
        write_jsonl(path.parent / f"{name}.jsonl", [{"text": row["question"]} for row in rows])
    with refused("objective.loss", "dpo_idk puts refusals in place of answers"):
        run(path, objective__loss="dpo_idk")


def test_rows_of_one_kind(path):
    rows = read_lines(path.parent / "forget.jsonl")
    write_jsonl(path.parent / "forget.jsonl", [*rows, {"text": "the film"}])
    with refused("forget", "documents and conversations"):
        run(path)


def test_an_empty_set_to_forget(path):
    (path.parent / "forget.jsonl").write_text("")
    with refused("forget.train", "empty"):
        run(path)


def test_the_column_is_the_references_log_probability(path):
    setting = built(path, objective__loss="dpo_idk")
    columns = setting.objective.columns(setting.lm, setting.lm, setting.encoded, batch_size=3)
    found = columns["train"][REFERENCE]
    sources = (setting.encoded.train, setting.encoded.alternative)
    for rows, column in zip(sources, found.T, strict=True):
        for row, value in zip(rows.rows, column, strict=True):
            log_probs = setting.lm.log_probs(setting.lm.params, np.array([row.ids]))[0]
            expected = sum(float(log_probs[place - 1]) for place in row.loss_positions)
            np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_the_configuration_reads_back(trained):
    stored = configs.load(FinetuneConfig, str(trained.parent / "run" / "config.yaml"))
    assert stored.objective == load(trained).objective
    assert isinstance(stored.forget, ForgetConfig)
    assert {type(x) for x in (*stored.objective.loss, *stored.objective.retain)} == {
        FORGET["npo"],
        RETAIN["nll"],
    }
    assert unlearning.FORGET is FORGET
