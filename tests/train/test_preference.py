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
from jaxlm.train.logging import numbers
from jaxlm.train.objectives import Preference
from jaxlm.train.objectives.preference import PROBE, REFERENCE, START
from jaxlm.train.run_folder import RunFolder
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
    assert wrong.any()
    assert right.any()
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
    assert found.keys() - {"gained"} == expected.keys() == metric.modes.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    prompts = [jnp.array(x.input_ids) for x in encoded.test[:PROBE]]
    models = (lm.params, params)
    start, end = (sum(next_token(lm, x, ids) for ids in prompts) / len(prompts) for x in models)
    best = np.argsort(start - end)[:5]
    assert [token for token, _ in found["gained"]] == [lm.tokenizer.decode([i]) for i in best]
    gains = [gain for _, gain in found["gained"]]
    np.testing.assert_allclose(gains, (end - start)[best], rtol=1e-4, atol=1e-7)
    assert metric("test", lm.params)["gained"] == []  # at the start, nothing gained


def test_metrics_name_the_tokens_that_gained_most(trained):
    last = [row for row in lines(trained) if "validation_gained" in row][-1]
    gains = [gain for _, gain in last["validation_gained"]]
    assert len(gains) == 5
    assert gains == sorted(gains, reverse=True)
    arrays = RunFolder(trained.parent / "run").metrics.arrays()
    assert "validation_gained" not in arrays
    assert arrays["validation_loss"][-1] == last["validation_loss"]


def next_token(lm, params, ids):
    """Probabilities of the token after a prompt, [V]."""
    return np.asarray(jax.nn.softmax(lm.apply(params, ids)[0, -1]))


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


@pytest.mark.slow
def test_a_reference_computes_in_the_dtype_of_the_run(path, copy):
    summary = run(path, compute_dtype="bfloat16", objective__reference=str(copy), steps="1")
    assert summary["zero_shot"]["margin"] == 0
    assert lines(path)[0]["zero_shot_loss"] == float(np.float32(np.log(2)))


def test_a_reference_that_reads_other_tokens_is_refused(path, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["good film"])
    with refused("objective.reference", "as other tokens than the model"):
        run(path, objective__reference=str(make_model(tmp_path / "model", tokenizer)))
    with refused("objective.reference", "there is no such"):
        run(path, objective__reference=str(tmp_path / "nowhere"))
    assert not (path.parent / "run").exists()


MEZO_ADAM = "{name: mezo_adam, learning_rate: 1e-2, eps: 1e-2}"


@pytest.mark.parametrize(
    "changes",
    [
        {"peft": "lora", "optimizer__learning_rate": "3e-2", "steps": "40"},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"steps": "40"},
                {"optimizer": "{name: mezo, learning_rate: 5e-3}", "steps": "400"},
                {"optimizer": MEZO_ADAM, "steps": "1000", "peft": "lora"},
            )
        ),
    ],
    ids=["adam_lora", "adam", "mezo", "mezo_lora"],
)
def test_training_ranks_pairs_that_it_has_not_seen(path, changes):
    """Films with one of eight words. Four ask for " good film", the others for " bad film".

    The responses are as long, and each is right half of the time: who reads them alone, or counts
    their tokens, is right half of the time. No prompt of the test is one of training.
    """
    for split, places in SPLITS.items():
        rows = [row for row in pairs(*places) if len(row["chosen"] + row["rejected"]) == 19]
        write_jsonl(path.parent / f"{split}.jsonl", rows)
    often = dict.fromkeys(("eval_every", "checkpoint_every", "log_every"), "1000")
    summary = run(path, batch_size="16", pairs__validation="null", **often, **changes)
    assert summary["test_rows_in_training"] == 0
    found, before = (summary[name]["ranking_accuracy"] for name in ("test", "zero_shot"))
    assert found >= max(0.8, before + 0.3)
    assert summary["test"]["loss"] < 0.69


@pytest.fixture
def stopped(path, monkeypatch) -> Path:
    """The YAML of a run that was stopped after half of its steps."""
    save = Checkpoints.save

    def stopping(self, step, *rest):
        save(self, step, *rest)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(path)
    return path


def test_a_stopped_run_resumes_bitwise(stopped, trained, monkeypatch):
    """What was computed before the first step is read, since the model has changed."""
    kept = stopped.parent / "run" / "columns.safetensors"
    assert kept.read_bytes() == (trained.parent / "run" / kept.name).read_bytes()
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    with refused(str(kept), "is damaged (got another checksum)"):
        run(stopped)
    data[-1] ^= 1
    kept.write_bytes(data)
    monkeypatch.setattr(Preference, "columns", None)  # would fail if it were called
    run(stopped)
    assert lines(stopped) == lines(trained)
    ends = []
    for each in (stopped, trained):
        folder = each.parent / "run"
        whole = Checkpoints(folder / "checkpoints", read_only=True).read(6)
        ends.append(jax.tree.leaves((whole, load_model(folder).params)))
    for one, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_configuration_of_a_run_reads_back_to_the_same_objects(trained):
    stored = configs.load(FinetuneConfig, str(trained.parent / "run" / "config.yaml"))
    assert stored.objective == load(trained).objective == Preference()
    assert finetune(stored) == json.loads((trained.parent / "run" / "summary.json").read_text())
    with refused("output", "objective.loss", "which cannot change"):
        run(trained, objective__loss="ipo")


@pytest.mark.parametrize("loss", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_a_run_is_planned(path, trained, loss):
    path = trained if loss == "dpo" else path
    config = load(path, objective__loss=loss)
    plan = dry_run(config, base_dir=path.parent, device=Device(name="toy", peak_flops=1e9))
    summary = finetune(config, base_dir=path.parent)
    assert plan.memory[0].peak == summary["peak_memory_bytes"] or plan.memory[1].peak
    assert plan.steps == 6


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_mesh_has_the_curves_of_one_device(path, tmp_path, model, loss):
    other = write(tmp_path / "other", model)
    run(path, objective__loss=loss)
    run(other, mesh=make_mesh(data=2, fsdp=2, model=2), objective__loss=loss)
    for new, old in zip(lines(other), lines(path), strict=True):
        assert new.keys() == old.keys()
        for name, value in numbers(old).items():
            np.testing.assert_allclose(new[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


def test_micro_batches_are_the_batch(path):
    settings = [built(path, accumulate=count) for count in ("1", "4")]
    encoded = settings[0].encoded
    reference = np.random.default_rng(0).normal(-9, 2, (len(encoded.train), 2))
    columns = {"train": {REFERENCE: reference.astype(np.float32)}}
    batch = dataclasses.replace(encoded, columns=columns).batch(0, batch_size=8, seed=0)
    found = []
    for setting in settings:
        loss_fn, params = setting.loss_fn(None), setting.lm.params
        found.append(jax.jit(jax.value_and_grad(lambda p, f=loss_fn: f(p, batch)[0]))(params))
    (value, grads), (expected, wanted) = found
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for one, other in zip(*map(jax.tree.leaves, (grads, wanted)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_run_is_monitored_by_another_metric_and_stops_early(path):
    summary = run(path, objective__loss="kto", monitor="reward_accuracy", patience="1", steps="60")
    values = [row["validation_reward_accuracy"] for row in lines(path) if "validation_loss" in row]
    assert summary["validation"] == {"reward_accuracy": max(values)}
    assert summary["stopped_early"]
    assert values[-1] <= max(values[:-1])


@pytest.mark.parametrize(
    ("changes", "key", "part"),
    [
        ({"pairs": "null", "task": "subj"}, "objective", "preference reads pairs (got task)"),
        (
            {"pairs": "null", "messages": "{train: train.jsonl}"},
            "objective",
            "preference reads pairs (got messages)",
        ),
        ({"objective": "completion"}, "objective", "completion reads task or messages or text"),
        ({"objective.beta": "0"}, "objective.beta", "must be above 0 (got 0.0)"),
        ({"objective.loss": "{beta: -1}"}, "objective.loss.beta", "must be above 0 (got -1.0)"),
        ({"objective.loss": "[sft, {beta: 0}]"}, "objective.loss[1].beta", "must be above 0"),
        ({"objective.loss": "ipoo"}, "objective.loss.name", "(got 'ipoo'). Did you mean ipo?"),
        ({"objective.loss": "[dpo, sfd]"}, "objective.loss[1].name", "Did you mean sft?"),
        ({"objective.loss": "best"}, "objective.loss.name", "Choose one of dpo, cdpo"),
        ({"objective.loss": "[]"}, "objective.loss", "must name a loss"),
        ({"objective.loss": "d2o"}, "objective.loss", "responses that the model itself samples"),
        ({"objective.loss": "sft", "objective.beta": "1"}, "objective.beta", "sft has none"),
        (
            {"objective.loss": "simpo", "objective.reference": "x"},
            "objective.reference",
            "simpo has none (got x)",
        ),
        ({"objective.loss": "aot", "accumulate": "2"}, "accumulate", "aot compares all pairs"),
        ({"objective.loss": "[dpo, kto]", "accumulate": "2"}, "accumulate", "kto compares all"),
        ({"objective.loss": "simpo", "monitor": "margin"}, "monitor", "not known (got 'margin')"),
        ({"monitor": "accuracy"}, "monitor", "Choose one of loss, ranking_accuracy"),
        ({"calibrate": "true"}, "calibrate", "needs the same options"),
    ],
)
def test_what_does_not_go_together(path, changes, key, part):
    with refused(key, part):
        run(path, **changes)
    assert not (path.parent / "run").exists()
