"""Reports of kernel behaviour: kernels by brute force, linear models, tables by hand, resuming."""

import dataclasses
import json
import statistics

import jax
import numpy as np
import pytest

from jaxlm.cli.main import main
from jaxlm.core.errors import UserError
from jaxlm.data import shipped_task
from jaxlm.kernels import AsymmetricSignGD, SignGD, empirical, saved
from jaxlm.studies import kernel, kernel_behaviour, kernel_training
from jaxlm.studies.kernel_behaviour import kernel_behaviour_report, measure, record
from jaxlm.studies.kernel_table import Nulls, markdown, rows, verdict
from jaxlm.studies.kernel_task import Kernels, kernel_task
from jaxlm.studies.kernel_training import Training, fine_tune
from jaxlm.train.loop import Diverged
from jaxlm.train.optimizers import Adam, Muon, Sgd
from tests.studies.test_kernel_task import few_shot, one_thread

__all__ = ["one_thread"]


def alike(folder):
    """As many examples of like lengths in every split: kernels of two splits are one program."""
    return few_shot(folder, long=" film", test=8)


@pytest.fixture(scope="module")
def task(tiny_model, tmp_path_factory):
    return kernel_task(tiny_model, alike(tmp_path_factory.mktemp("task")), seed=0)


@pytest.fixture(scope="module")
def gradients(task):
    """One row of P numbers an example, one example at a time and without padding."""

    def gradient(params, ids, place):
        words = task.encoded.token_ids
        f = lambda p: task.lm.apply(p, ids)[0, place, words]  # noqa: E731
        return jax.grad(lambda p: f(p)[1] - f(p)[0])(params)

    compiled = jax.jit(gradient)

    def of(split):
        found = []
        for each in getattr(task.encoded, split):
            ids = np.asarray(each.input_ids[0], np.int32)[None]
            leaves = jax.tree.leaves(compiled(task.lm.params, ids, each.positions[0][0]))
            found.append(np.concatenate([np.ravel(leaf) for leaf in leaves]))
        return np.stack(found).astype(np.float64)

    return {split: of(split) for split in ("train", "test")}


# The kernels themselves are compared in tests/kernels; K-A-SignGD also has sides to confuse.
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("sgd", "signgd")]


@pytest.mark.parametrize("kind", [*SLOW, "asymmetric_signgd"])
def test_kernels_are_products_of_gradients(task, gradients, kind):
    kernels = Kernels(task, kinds={"signgd": SignGD(0), "asymmetric_signgd": AsymmetricSignGD(0)})
    train, test = gradients["train"], gradients["test"]
    signed = {"sgd": (train, test), "signgd": (np.sign(train), np.sign(test))}
    right, left = signed.get(kind, (np.sign(train), test))
    found = kernels.of(kind, "test")[:, 0, :, 0]
    # Signs of gradients that are zero but for rounding are the toss of a coin.
    tolerance = 1e-4 if kind == "sgd" else 3e-2
    np.testing.assert_allclose(found, left @ right.T, atol=tolerance * np.abs(found).max())
    own = train if kind == "asymmetric_signgd" else right
    found = kernels.of(kind, "train")[:, 0, :, 0]
    np.testing.assert_allclose(found, own @ right.T, atol=tolerance * np.abs(found).max())
    if kind == "asymmetric_signgd":
        found = kernels.flipped(kind, "test")[:, 0, :, 0]
        wanted = train @ np.sign(test).T
        np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(found).max())
    assert kernels.of(kind, "test") is kernels.of(kind, "test")


def test_kernels_of_groups_are_joined_in_the_order_of_the_split(tmp_path, tiny_model, monkeypatch):
    task = kernel_task(tiny_model, few_shot(tmp_path), seed=0)
    assert len(task.groups("test")) == 2
    found, places = Kernels(task, tmp_path / "kernels"), []

    def features(x):
        ids = np.where(x["attention_mask"], x["input_ids"], 0)
        return np.stack([ids.sum(1), ids.max(1), ids[:, 2]], 1)

    def product(self, params, kind, x1, x2, place):
        places.append(place)
        # As K-A-SignGD, which is not symmetric.
        return np.einsum("np,mp->nm", features(x1), np.sqrt(features(x2)))[:, None, :, None]

    monkeypatch.setattr(Kernels, "_ntk", product)
    rows = {}
    for split in ("train", "test"):
        texts = [each.input_ids[0] for each in getattr(task.encoded, split)]
        rows[split] = np.array([[sum(ids), max(ids), ids[2]] for ids in texts])
    assert len(np.unique(rows["test"], axis=0)) > 6
    for kind in ("sgd", "signgd"):
        wanted = rows["test"] @ np.sqrt(rows["train"]).T
        np.testing.assert_allclose(found.of(kind, "test")[:, 0, :, 0], wanted)
        wanted = rows["train"] @ np.sqrt(rows["test"]).T
        np.testing.assert_allclose(found.flipped(kind, "test")[:, 0, :, 0], wanted)
    assert len(set(places)) == len(places) == 8


def test_training_keeps_what_is_best_on_validation(task, monkeypatch):
    training = Training(
        optimizer=Adam(name="adam"), learning_rates=(1e-5, 2e-2), steps=30, eval_every=10
    )
    looks = []

    class Look(kernel_training._Best):
        def __call__(self, params):
            looks.append(super().__call__(params)["validation_accuracy"])
            return {}

    monkeypatch.setattr(kernel_training, "_Best", Look)
    tuned = fine_tune(task, training, seed=0)
    before, trained = looks[0], [*looks[1:4], *looks[5:]]
    assert (looks[4], len(trained)) == (before, 6)
    assert tuned.validation == max(trained) > before
    assert tuned.learning_rate == 2e-2
    assert trained[3 + tuned.step // 10 - 1] == max(trained)
    scores = task.values(jax.jit(task.f), "validation", tuned.params)
    assert task.accuracy(scores, "validation") == tuned.validation


def test_a_rate_that_diverges_is_passed_over(task, monkeypatch):
    rates = []

    def fit(method, params, *args, evaluate, **options):
        rates.append(len(rates))
        if rates[-1] != 2:
            raise Diverged("the loss is nan")
        for _ in range(2):  # before and after training
            evaluate(params)

    monkeypatch.setattr(kernel_training, "fit", fit)
    training = Training(optimizer=Sgd(), learning_rates=(1e30,), steps=4, eval_every=4)
    with pytest.raises(
        UserError, match="learning_rates: fine-tuning failed with every one of them"
    ):
        fine_tune(task, training, seed=0)
    both = dataclasses.replace(training, learning_rates=(1e30, 1e-3, 1e20))
    assert fine_tune(task, both, seed=0).learning_rate == 1e-3


@pytest.mark.slow
def test_a_function_that_is_linear_in_what_is_trained_has_kernel_behaviour(tmp_path, tiny_model):
    """An output embedding of its own, alone trained: f is linear, its kernel never moves."""
    config = few_shot(tmp_path)
    task = kernel_task(tiny_model, config, seed=0, prompt=False)
    only = "^lm_head"
    kernels = Kernels(task, select=only)
    training = Training(optimizer=Sgd(select=only, learning_rate=0.3), steps=30, eval_every=30)
    report = measure(kernels, training, seed=0)
    assert report.linearized == report.fine_tuned
    (kernel,) = report.kernels
    assert (kernel.kind, kernel.change) == ("sgd", (0.0, 0.0, 0.0, pytest.approx(1.0), 0.0))
    expected = 1.0 if report.fine_tuned > report.zero_shot else None
    assert report.recovered == expected
    # The kernel is of hidden states: a row's gradient is minus the other's.
    hidden = task.values(jax.jit(lambda p, x: read(task, p, x)), "train", task.lm.params)
    found = kernels.of("sgd", "train")[:, 0, :, 0]
    np.testing.assert_allclose(found, 2 * hidden @ hidden.T, atol=1e-5 * found.max())
    assert (kernel.rank, kernel.size) == (np.linalg.matrix_rank(hidden @ hidden.T), 8)


def read(task, params, x):
    states = task.lm.hidden(params, x["input_ids"], x["attention_mask"])
    return states[np.arange(len(states)), x["positions"]]


@pytest.mark.slow
def test_a_report_reads_like_its_parts(tmp_path, tiny_model):
    training = Training(
        optimizer=Adam(name="adam", learning_rate=2e-2), steps=20, eval_every=10, batch_size=4
    )
    report = kernel_behaviour_report(tiny_model, few_shot(tmp_path), training, seed=0)
    assert [kernel.kind for kernel in report.kernels] == ["signgd", "asymmetric_signgd"]
    assert (report.k, len(report.train_labels), report.majority) == (4, 8, 0.5)
    assert report.fine_tuned > report.zero_shot
    assert json.loads(json.dumps(record(report))) == record(report)
    text = str(report)
    assert "K-A-SignGD" in text
    assert f"{100 * report.fine_tuned:.1f}" in text


@pytest.mark.parametrize(
    ("numbers", "judged"),
    [
        ((0.5, 0.9, 0.75, 0.80, 1.99), (True, True, True, True)),
        ((0.5, 0.9, 0.75, 0.79, 1.99), (False, True, True, False)),
        ((0.5, 0.9, 0.70, 0.90, 0.1), (True, False, True, False)),
        ((0.5, 0.9, 0.90, 0.95, 2.0), (True, True, False, False)),
        ((0.9, 0.9, 0.90, 0.90, 0.1), (None, None, True, None)),
    ],
)
def test_verdicts(numbers, judged):
    found = verdict(*numbers)
    assert (*found, found.kernel_behaviour) == judged


@pytest.mark.parametrize(
    ("nulls", "judged"),
    [
        (Nulls(0.04, 0.59, 0.54, 1.01), (True, True, True, True)),
        (Nulls(0.05, 0.59, 0.54, 1.01), (None, None, True, None)),
        (Nulls(0.04, 0.61, 0.54, 1.01), (False, True, True, False)),
        (Nulls(0.04, 0.59, 0.56, 1.01), (True, False, True, False)),
        (Nulls(0.04, 0.59, 0.54, 0.99), (True, True, False, False)),
    ],
)
def test_a_criterion_is_met_only_above_what_knows_nothing(nulls, judged):
    """Of a gain of 0.4: the kernel at 0.8, the linearization at 0.75, a change of 0.5."""
    found = verdict(0.5, 0.9, 0.75, 0.8, 0.5, nulls)
    assert (*found, found.kernel_behaviour) == judged


def test_a_null_kernel_has_no_kernel_behaviour_where_the_gain_is_small():
    """Three points of gain on 500 texts; a kernel at 52.8 % passes the paper's criteria."""
    numbers = (0.599, 0.627, 0.618, 0.528, 0.49)
    assert verdict(*numbers).kernel_behaviour
    for p in (0.2, 0.01):
        assert not verdict(*numbers, Nulls(p, 0.53, 0.6, 2.0)).kernel_behaviour


def test_a_linearization_that_overshoots_is_not_linear():
    assert verdict(0.5, 0.6, 0.9, 0.6, 0.1).linear
    assert not verdict(0.5, 0.6, 0.9, 0.6, 0.1, Nulls(0.01, 0.5, 0.5, 2.0)).linear


def made(seed, zero_shot, fine_tuned, linearized, kernel, change, **more):
    changed = dict.fromkeys(("mean", "median", "frobenius", "alignment"), change)
    found = {
        "kind": "sgd", "test": kernel, "validation": 0.5, "settings": {"ridge": 0.1},
        "change": changed, "null": 0.5, "control": dict.fromkeys(changed, 10.0),
    }  # fmt: skip
    return {
        "task": "t", "prompt": True, "seed": seed, "k": 2, "train_labels": [0, 0, 1, 1],
        "optimizer": "sgd", "majority": 0.5, "zero_shot": zero_shot, "fine_tuned": fine_tuned,
        "linearized": linearized, "kernels": [found], "gain_p": 0.01, "null_linearized": 0.5,
        **more,
    }  # fmt: skip


def test_a_table_has_means_over_seeds():
    records = [
        made(3, 0.5, 0.8, 0.75, 0.7, 1.0),
        made(5, 0.6, 0.9, 0.65, 0.9, 4.0),
        made(3, 0.6, 0.6, 0.5, 0.6, "inf", prompt=False),
    ]
    first, second = rows(records)
    kernel = first["kernels"]["sgd"]
    assert first["seeds"] == [3, 5]
    assert first["fine_tuned"]["mean"] == pytest.approx(0.85)
    assert first["fine_tuned"]["std"] == pytest.approx(statistics.stdev([0.8, 0.9]))
    assert kernel["below"] == pytest.approx(0.05)
    assert kernel["recovered"] == pytest.approx(0.5)
    assert kernel["change"]["mean"]["mean"] == 2.5
    assert list(kernel["verdict"].values()) == [True, False, False, False]
    assert list(second["kernels"]["sgd"]["verdict"].values()) == [None, None, False, None]
    text = markdown(records)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["t", "2", "yes", "sgd", "50.0 (0.0)", "55.0 (7.1)", "85.0 (7.1)", "70.0 (7.1)",
            "80.0 (14.1)"] in cells  # fmt: skip
    assert [
        "t",
        "2",
        "yes",
        "sgd",
        "K-SGD",
        "0.01",
        "5.0",
        "30.0",
        "50 %",
        "-17 %",
        "2.50",
        "10.00",
        "yes",
        "no",
        "no",
        "no",
        "no",
    ] in cells
    assert ["t", "2", "no", "sgd", "K-SGD", "0.01", "0.0", "10.0", "", "", "inf", "10.00", "", "",
            "no", "", ""] in cells  # fmt: skip


def study(folder, tiny_model):
    task = alike(folder)
    path = folder / "study.yaml"
    path.write_text(f"""\
study: kernel
model: {tiny_model}
task: {{name: tiny, template: "{task.template}", labels: [good, bad], train: rows.jsonl,
       test: test.jsonl}}
ks: [4]
prompts: [true, false]
seeds: [0]
training:
  - {{optimizer: {{name: sgd, learning_rate: 0.1}}, steps: 6, eval_every: 3, batch_size: 4}}
  - {{optimizer: {{name: adam, learning_rate: 0.01}}, steps: 6, eval_every: 3, batch_size: 4}}
output: {folder / "study"}
""")
    return path


@pytest.mark.slow
def test_a_study_is_one_table_and_is_not_made_twice(tmp_path, tiny_model, capsys, monkeypatch):
    path = study(tmp_path, tiny_model)
    names = [
        f"{draw}-k4-seed0-{optimizer}.json"
        for draw in ("prompt", "no-prompt")
        for optimizer in ("sgd", "adam")
    ]
    assert main(["study", str(path), "--dry-run"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed == [str(tmp_path / "study" / "reports" / name) for name in names]
    assert main(["study", str(path)]) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "study" / "table.md").read_text() in shown
    found = json.loads((tmp_path / "study" / "table.json").read_text())["rows"]
    assert [(row["prompt"], row["optimizer"]) for row in found] == [
        (True, "sgd"), (True, "adam"), (False, "sgd"), (False, "adam")
    ]  # fmt: skip
    assert [list(row["kernels"]) for row in found[:2]] == [["sgd"], ["signgd", "asymmetric_signgd"]]

    monkeypatch.setattr(kernel, "measure", None)
    monkeypatch.setattr(kernel, "kernel_task", None)
    assert main(["study", str(path)]) == 0
    assert capsys.readouterr().out == shown
    assert main(["study", str(path), "--solver=logistic"]) == 2
    error = capsys.readouterr().err
    assert "-sgd.json: was made with solver = " in error
    assert "ridge" in error


def test_a_stopped_study_takes_its_kernels_from_disk(tmp_path, tiny_model, monkeypatch):
    path = study(tmp_path, tiny_model)
    sgd = "{optimizer: {name: sgd, learning_rate: 0.1}, steps: 6, eval_every: 3, batch_size: 4}"
    words = ["--prompts=[true]", f"--training=[{sgd}]"]

    def fine_tune(task, training, *, seed):  # trained for real in the slow tests
        moved = jax.tree.map(lambda x: x + 0.1, task.lm.params)
        return kernel_training.Tuned(moved, learning_rate=0.1, step=3, validation=0.5)

    monkeypatch.setattr(kernel_behaviour, "fine_tune", fine_tune)
    monkeypatch.setattr(Kernels, "at", lambda self, params, kind, split: self.of(kind, split))
    assert main(["study", str(path), *words]) == 0
    report = tmp_path / "study" / "reports" / "prompt-k4-seed0-sgd.json"
    before = json.loads(report.read_text())
    report.unlink()
    # Every computation of a kernel begins here.
    monkeypatch.setattr(saved, "prepare", None)
    monkeypatch.setattr(empirical, "prepare", None)
    assert main(["study", str(path), *words]) == 0
    after = json.loads(report.read_text())
    for name in ("zero_shot", "fine_tuned", "linearized"):
        assert after[name] == before[name]
    for old, new in zip(before["kernels"], after["kernels"], strict=True):
        assert (new["test"], new["settings"]) == (old["test"], old["settings"])


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--seeds=[]", "seeds: is empty (got nothing). Give at least one."),
        ("--ks=[4, 4]", "ks: has a value twice (got 4). Give each once."),
        ("--ks=[1]", "ks: must be from 2 to 2147483647 (got 1). Correct it."),
        ("--output=", "output: is empty (got nothing). Give a path."),
        ("--ks=[400]", "Lower it or give more examples."),
    ],
)
def test_mistakes_are_named(tmp_path, tiny_model, capsys, flag, sentence):
    path = study(tmp_path, tiny_model)
    assert main(["study", str(path), flag]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": 1}', "{}"])
def test_a_damaged_report_is_named(tmp_path, text):
    made = kernel.KernelConfig(task=shipped_task("mr"), output=str(tmp_path))
    case = next(kernel.cases(made))
    path = tmp_path / "reports" / case.name
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{path}: "):
        kernel.kernel_study(made)


def test_an_optimizer_without_a_kernel_is_refused():
    with pytest.raises(
        UserError,
        match=r"^optimizer\.name: not known \(got 'muon'\)\. Choose one of sgd, mezo, adam",
    ):
        Training(optimizer=Muon())
    twice = (Training(optimizer=Sgd()), Training(optimizer=Sgd(learning_rate=1.0)))
    with pytest.raises(UserError, match="training: has a value twice"):
        kernel.KernelConfig(task=shipped_task("mr"), training=twice, output="o")
