"""The objective `preference`: its loss, its reference, its metrics, and runs of it."""

import dataclasses
import gc
import json
import weakref
from pathlib import Path

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import preference
from jaxlm.cli import config as configs
from jaxlm.cli.main import main
from jaxlm.core.errors import UserError
from jaxlm.cost.device import Device
from jaxlm.cost.plan import dry_run
from jaxlm.data.rows import epoch_places, pad
from jaxlm.models import from_pretrained, save_pretrained
from jaxlm.preference import PairScores
from jaxlm.sharding import make_mesh
from jaxlm.train import finetuning
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.finetuning import FinetuneConfig, finetune
from jaxlm.train.load import load_model
from jaxlm.train.objectives import Preference
from jaxlm.train.objectives.preference import REFERENCE, START, responses
from tests.helpers.sentences import refused
from tests.helpers.tiny import make_model, make_tokenizer, read_lines, sentences, write_jsonl

YAML = """\
model: {model}
pairs: {{train: train.jsonl, validation: validation.jsonl, test: test.jsonl}}
objective: {{name: preference, loss: {loss}}}
optimizer: {{name: adam, learning_rate: 1.0e-2}}
steps: 6
batch_size: 8
eval_batch_size: 8
eval_every: 3
checkpoint_every: 3
log_every: 1
output: {folder}/run
"""
SPLITS = {"train": (0, 32), "validation": (32, 40), "test": (40, 56)}


def pairs(first: int, last: int) -> list[dict]:
    """Films that one word makes good or bad; both responses are as long, and as often right."""
    rows = []
    for i, row in enumerate(sentences(last)[first:], start=first):
        said = [" good film", " bad film"] if i % 3 else [" good film it was", " bad"]
        right = row["label"] == 0
        both = dict(zip(("chosen", "rejected"), said if right else said[::-1], strict=True))
        rows.append({"prompt": f"{row['text']} it was", **both})
    return rows


def write(folder: Path, model: Path, loss: str = "dpo") -> Path:
    folder.mkdir(exist_ok=True)
    for split, places in SPLITS.items():
        write_jsonl(folder / f"{split}.jsonl", pairs(*places))
    path = folder / "run.yaml"
    path.write_text(YAML.format(model=model, loss=loss, folder=folder))
    return path


def load(path: Path, **changes: str) -> FinetuneConfig:
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return configs.load(FinetuneConfig, str(path), changes)


def run(path: Path, mesh=None, **changes: str):
    return finetune(load(path, **changes), base_dir=path.parent, mesh=mesh)


def lines(path: Path, name: str = "run") -> list[dict]:
    return read_lines(path.parent / name / "metrics.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "pairs", scale=3)


@pytest.fixture
def path(tmp_path, model) -> Path:
    return write(tmp_path / "here", model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model) -> Path:
    """The YAML of a run that was not stopped."""
    path = write(tmp_path_factory.mktemp("trained"), model)
    run(path)
    return path


def built(path: Path, **changes: str):
    """The model, the objective and the encoded pairs of a run."""
    config = load(path, **changes)
    data = finetuning.read_data(config, base_dir=path.parent)
    return finetuning.build(config, load_model(config.model), data)


def whole_rows(lm, params, examples):
    """Log-probabilities of all responses, [N, C], and their lengths, by whole rows."""
    texts = [(x.input_ids[0], response) for x in examples for response in x.targets]
    ids, mask = pad([prompt + response for prompt, response in texts], (24,))
    for row, (prompt, _) in zip(scored := mask.copy(), texts, strict=True):
        row[: len(prompt)] = 0
    sums = jnp.sum(lm.log_probs(params, ids, mask) * scored[:, 1:], axis=1)
    return sums.reshape(len(examples), -1), scored.sum(1).reshape(len(examples), -1)


MIXTURE = "[{name: dpo, weight: .8}, {name: ipo, beta: .3}, {name: sft, weight: .1}]"


@pytest.mark.parametrize("losses", [(MIXTURE, "aot", "simpo"), ("{name: kto, beta: .5}",)])
def test_the_loss_and_its_gradient_are_those_of_whole_rows(path, losses):
    settings = [built(path, objective__loss=loss) for loss in losses]
    lm, encoded = settings[0].lm, settings[0].encoded
    count, size = len(encoded.train[0].targets), len(encoded.train)
    reference = np.random.default_rng(0).normal(-9, 2, (size, count)).astype(np.float32)
    encoded = dataclasses.replace(encoded, columns={"train": {REFERENCE: reference}})
    batch, places = encoded.batch(1, batch_size=6, seed=3), epoch_places(6, 6, size, seed=3)
    np.testing.assert_array_equal(batch[REFERENCE], reference[places])

    def by_hand(params):
        found, tokens = whole_rows(lm, params, [encoded.train[i] for i in places])
        z = None
        if count == 3:
            z = jax.lax.stop_gradient(jnp.maximum(jnp.mean((found - reference[places])[:, 2]), 0))
        scores = PairScores(*found.T[:2], *reference[places].T[:2], *tokens.T[:2], z=z)
        return [jnp.mean(preference.loss(scores, s.objective.terms)) for s in settings]

    def ours(params):
        return [s.objective.loss_fn(lm, None, encoded, {})(params, batch)[0] for s in settings]

    def values_and_gradient(losses_of):
        def weighed(params):
            values = losses_of(params)
            return sum(weight * x for weight, x in zip((1, 2, 3), values, strict=False)), values

        (_, values), grads = jax.jit(jax.value_and_grad(weighed, has_aux=True))(lm.params)
        return values, jax.flatten_util.ravel_pytree(grads)[0]

    (found, grads), (expected, slopes) = map(values_and_gradient, (ours, by_hand))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(grads, slopes, atol=1e-5 * jnp.abs(slopes).max())


def test_the_first_loss_is_log_2(trained):
    rows = lines(trained)
    first = next(row["loss"] for row in rows if "loss" in row)
    assert rows[0]["zero_shot_loss"] == first == float(np.float32(np.log(2)))
    assert rows[0]["zero_shot_margin"] == rows[0]["zero_shot_displaced"] == 0


@pytest.mark.parametrize("loss", ["{name: dpo, beta: .5}", "{name: kto, beta: .5}", "simpo"])
def test_metrics_by_brute_force(path, loss):
    setting = built(path, objective__loss=loss)
    _, lm, objective, _, encoded = setting
    columns = objective.columns(lm, lm, encoded, batch_size=8)
    metric = setting._replace(encoded=dataclasses.replace(encoded, columns=columns)).metric()
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), lm.params
    )
    found = metric("test", params)
    whole = jax.jit(lambda params: whole_rows(lm, params, encoded.test))
    (before, tokens), (after, _) = jax.device_get((whole(lm.params), whole(params)))
    np.testing.assert_allclose(columns["test"][START], before, rtol=1e-5)
    (bw, bl), (c, l), (n_w, n_l) = before.T[:2], after.T[:2], tokens.T[:2]
    d = (c - bw) - (l - bl)
    if "dpo" in loss:
        losses = np.log1p(np.exp(-0.5 * d))
    elif "kto" in loss:
        z = max(np.mean(after[:, 2] - before[:, 2]), 0)
        losses = 1 / (1 + np.exp(0.5 * (c - bw - z))) + 1 / (1 + np.exp(0.5 * (z - (l - bl))))
        losses /= 2
    else:
        losses = np.log1p(np.exp(0.5 - 2 * (c / n_w - l / n_l)))
    wrong, right = bw < bl, bw >= bl
    assert wrong.any() and right.any()
    expected = {
        "loss": losses.mean(),
        "ranking_accuracy": np.mean(c >= l),
        "ranking_accuracy_per_token": np.mean(c / n_w >= l / n_l),
        "chosen_change": np.mean(c - bw),
        "rejected_change": np.mean(l - bl),
        "displaced": np.mean(c < bw),
        "corrected": np.mean((c >= l)[wrong]),
        "spoiled": np.mean((c < l)[right]),
    }
    if loss != "simpo":
        expected |= {"reward_accuracy": np.mean(d > 0), "margin": d.mean()}
    assert found.keys() == expected.keys() == metric.modes.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_kto_compares_with_responses_to_other_prompts(path):
    rows = [
        {
            "prompt": "the bright film",
            "responses": [" good", " bad film", " it"],
            "scores": [3, 2, 1],
        },
        {"prompt": "the cold film number 3 it was", "chosen": " bad", "rejected": " good"},
        {"prompt": "film", "chosen": " it was good film number 4 it was", "rejected": " bad"},
    ]
    write_jsonl(path.parent / "train.jsonl", rows)
    encoded = built(path, objective__loss="kto")[4]
    plain = built(path)[4]
    longest = max(len(x.input_ids[0]) + len(y) for x in plain.train for y in x.targets)
    for each, old in zip(encoded.train, plain.train, strict=True):
        assert each.targets[:2] == old.targets
        third, prompt = each.targets[2], each.input_ids[0]
        others = [x.targets[0] for x in plain.train if x.input_ids != each.input_ids]
        assert third in [other[: longest - len(prompt)] for other in others]
        assert third
    assert len(encoded.train) == 5
    assert {len(x.targets) for x in (*encoded.validation, *encoded.test)} == {3}


@pytest.fixture(scope="module")
def copy(tmp_path_factory, model) -> Path:
    """The same model in another place."""
    place = tmp_path_factory.mktemp("models") / "copy"
    save_pretrained(from_pretrained(model), place)
    return place


def test_a_reference_by_its_path(path, trained, copy, model, tmp_path, monkeypatch):
    """The same model by its path is the same reference; it is freed before training."""
    loaded, train = [], finetuning.train

    def remember(name, **options):
        lm = load_model(name, **options)
        if name == str(copy):
            loaded.append(weakref.ref(jax.tree.leaves(lm.params)[0]))
        return lm

    def freed(*args, **options):
        gc.collect()
        assert len(loaded) == 2  # for its digest, and for the columns
        assert all(leaf() is None for leaf in loaded)
        return train(*args, **options)

    monkeypatch.setattr(finetuning, "load_model", remember)
    monkeypatch.setattr(finetuning, "train", freed)
    run(path, objective__reference=str(copy))
    assert lines(path) == lines(trained)
    monkeypatch.undo()
    # Found from another folder, and by another name.
    (path.parent / "run" / "summary.json").unlink()
    monkeypatch.chdir(copy.parent)
    run(path, objective__reference="copy")
    assert lines(path) == lines(trained)
    # Another model there is refused, and so it is before the first step.
    lm = from_pretrained(copy)
    other = save_and_return(lm.replace(params=jax.tree.map(lambda x: 1.1 * x, lm.params)), tmp_path)
    (path.parent / "run" / "summary.json").unlink()
    with pytest.raises(UserError, match=r"^objective\.reference: has changed since the run in"):
        run(path, objective__reference=str(other))
    found = run(path, objective__reference=str(other), output=str(tmp_path / "other"))
    assert found["zero_shot"]["margin"] != 0


def save_and_return(lm, folder: Path) -> Path:
    save_pretrained(lm, folder / "changed")
    return folder / "changed"


def test_a_reference_that_reads_other_tokens_is_refused(path, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["good film"])
    with refused("objective.reference", "as other tokens than the model"):
        run(path, objective__reference=str(make_model(tmp_path / "model", tokenizer)))
    with refused("objective.reference", "there is no such"):
        run(path, objective__reference=str(tmp_path / "nowhere"))
    assert not (path.parent / "run").exists()
