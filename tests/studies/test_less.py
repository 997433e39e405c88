"""The study of selections: its stages against other ways to compute them, and that they go on."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.data import PaddedRows, TaskConfig
from jaxlm.influence import GradientStore, StoreWriter, projector
from jaxlm.peft import LORA, Lora
from jaxlm.studies import less, less_training
from jaxlm.studies.less import SelectionConfig, read_sides, selection_study
from jaxlm.studies.less import _markdown as markdown
from jaxlm.studies.less_choice import (
    matched,
    read_choice,
    shares_of_answers,
    write_choice,
)
from jaxlm.studies.less_cost import LLAMA_7B, PAPER, Plan, adapter_size, costs, row_flops
from jaxlm.studies.less_features import Features, store_features
from jaxlm.studies.less_rows import PoolRow, Reader, Rows, Source, Target
from jaxlm.studies.less_training import Measure, Recipe, epoch_weights, load_epoch, train
from jaxlm.train.load import load_model
from jaxlm.train.losses import mean_row_loss, row_losses
from jaxlm.train.optimizers import Adam
from tests.helpers.tiny import make_model, make_tokenizer, read_lines, sentences, write_jsonl

RECIPE = Recipe(
    peft=Lora(rank=2, alpha=4.0),
    optimizer=Adam(name="adam", learning_rate=1e-2, schedule="linear"),
    warmup_share=0.25,
    epochs=2,
    batch_size=4,
)
FEATURES = Features(family="countsketch", dim=64, dtype="float32", block_size=4)


@pytest.fixture(scope="module")
def lm(tiny_model):
    return load_model(tiny_model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 40), ("validation", 8), ("test", 12)):
        write_jsonl(folder / f"{name}.jsonl", sentences(count))
    return folder


def task(**changes) -> TaskConfig:
    values = {
        "name": "tiny",
        "train": "train.jsonl",
        "template": "{text} it was {label}",
        "labels": ("good", "bad"),
    }
    return TaskConfig(**values | changes)


def config(output: Path, model: Path, **changes) -> SelectionConfig:
    target = task(train=None, validation="validation.jsonl", test="test.jsonl")
    values = {
        "model": str(model),
        "sources": {
            "right": Source(task=task(), rows=12),
            "noise": Source(task=task(), rows=12, skip=12, labels="shuffled"),
            "none": Source(task=task(train=None)),
        },
        "target": Target(task=target, rows=6),
        "recipe": RECIPE,
        "warmup_fraction": 0.5,
        "features": FEATURES,
        "fraction": 0.25,
        "output": str(output),
    }
    return SelectionConfig(**values | changes)


@pytest.fixture(scope="module")
def sides(lm, folder, tiny_model):
    return read_sides(config(folder, tiny_model), lm, base_dir=folder)


def test_the_weights_are_those_of_the_published_checkpoints() -> None:
    """13,533 rows in batches of 128 over 4 epochs, Llama-2-7B; their selection script has these."""
    optimizer = dataclasses.replace(Recipe().optimizer, warmup=13)
    weights = epoch_weights(optimizer, 4, 105)
    published = [1.6877e-05, 1.2859e-05, 7.7030e-06, 2.5616e-06]
    np.testing.assert_allclose(weights, published, rtol=0.02)
    assert Recipe().optimizer_for(13_533).warmup == 13  # 3 % of 424 steps
    assert epoch_weights(Adam(learning_rate=0.5), 2, 3) == [0.5, 0.5]


def test_shuffled_labels_are_noise_where_they_differ(lm, folder) -> None:
    reader = Reader(lm, 32, seed=3, base_dir=folder)
    shuffled = Source(task=task(), rows=20, skip=20, labels="shuffled")
    own = reader.source("a", Source(task=task(), rows=20)).rows
    rest = reader.source("a", Source(task=task(), rows=20, skip=20)).rows
    noisy = reader.source("a", shuffled).rows
    assert [row.id for row in rest] == [row.id for row in noisy]
    assert len({row.id for row in (*own, *rest)}) == 40
    assert not any(row.noise for row in (*own, *rest))
    changed = [a.ids != b.ids for a, b in zip(rest, noisy, strict=True)]
    assert [row.noise for row in noisy] == changed
    assert 0 < sum(changed) < 20
    answers = [sorted(row.text["completion"] for row in rows) for rows in (rest, noisy)]
    assert answers[0] == answers[1]
    for row in noisy:
        assert row.loss_positions == (len(row.ids) - 1,)
        assert lm.tokenizer.decode(row.ids[-1:]) == row.text["completion"].strip()


def rows_of(*lengths: int) -> list[PoolRow]:
    """Rows 1, 2, 3, ... of which the last two tokens are learnt, or one of one token less."""
    made = []
    for i, length in enumerate(lengths):
        ids = tuple(range(1, length + 1))
        made.append(PoolRow(f"r{i}", ids, tuple(range(max(1, length - 2), length))))
    return made


def test_a_batch_has_what_predicts_each_token() -> None:
    padded = PaddedRows(rows_of(3, 5), 0, "targets")
    batch = padded.batch([1, 0])
    np.testing.assert_array_equal(
        batch["input_ids"], [[1, 2, 3, 4, 5, 0, 0, 0], [1, 2, 3, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(batch["attention_mask"], batch["input_ids"] > 0)
    np.testing.assert_array_equal(batch["positions"], [[2, 3], [0, 1]])
    np.testing.assert_array_equal(batch["targets"], [[4, 5], [2, 3]])
    np.testing.assert_array_equal(batch["target_mask"], np.ones((2, 2)))


def test_rows_come_in_few_shapes_and_once_an_epoch() -> None:
    padded = PaddedRows(rows_of(*range(2, 42)), 0, "targets")
    assert [length for length, _ in padded.shapes] == [24, 40, 48]
    blocks = list(padded.blocks(16))
    assert sorted(place for block in blocks for place in block) == list(range(40))
    for block in blocks:
        lengths = [len(padded.rows[place].ids) for place in block]
        least = max([0, *(size for size, _ in padded.shapes if size < max(lengths))])
        assert min(lengths) > least
    order = [place for block in blocks for place in block]
    assert [place for block in padded.blocks(16, 5) for place in block] == order[5:]

    def drawn(first, count):
        batch = padded.batches(first, count, batch_size=8, seed=1)
        return (batch["attention_mask"].sum(-1) - 2).tolist()

    epochs = drawn(0, 10)
    for epoch in (epochs[:5], epochs[5:]):
        assert sorted(place for batch in epoch for place in batch) == list(range(40))
    assert epochs[:5] != epochs[5:]
    assert drawn(3, 4) == epochs[3:7]


def brute_losses(lm, params, rows):
    """The mean over learnt tokens from all logits, without a mask: nothing sees what is behind."""
    ids = np.zeros((len(rows), max(len(row.ids) for row in rows)), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
    logp = np.asarray(jax.nn.log_softmax(jax.jit(lm.apply)(params, ids)), np.float64)
    return np.array(
        [
            -np.mean([logp[i, t - 1, row.ids[t]] for t in row.loss_positions])
            for i, row in enumerate(rows)
        ]
    )


def test_losses_are_means_over_what_is_learnt(lm) -> None:
    rows = rows_of(4, 9, 2)
    batch = PaddedRows(rows, 0, "targets").batch([0, 1, 2])
    found = jax.jit(row_losses(lm))(lm.params, batch)
    np.testing.assert_allclose(found, brute_losses(lm, lm.params, rows), rtol=1e-5)
    loss, _ = jax.jit(mean_row_loss(lm))(lm.params, batch)
    np.testing.assert_allclose(loss, np.mean(found), rtol=1e-6)


@pytest.fixture(scope="module")
def warmup(lm, sides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("warmup")
    rows = sides[0].rows[:8]
    return folder, rows, train(folder, lm, rows, RECIPE, seed=5, keep=True)


def adam_state(state) -> optax.ScaleByAdamState:
    """The only one in a chain's state."""

    def is_adam(node) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    (found,) = filter(is_adam, jax.tree.leaves(state, is_leaf=is_adam))
    return found


def test_training_is_adam_on_the_mean_of_the_rows(lm, warmup) -> None:
    """Against optax alone, with the learning rates that linear warm-up and decay have: 4 steps."""
    folder, rows, params = warmup
    ready = RECIPE.prepare(lm, 5)
    trained, frozen = paths.split(ready.params, LORA)
    rates = [0.0, 0.01, 0.01 * 2 / 3, 0.01 / 3]
    adam = optax.scale_by_adam()
    state = adam.init(trained)
    padded = PaddedRows(rows, 0, "targets")
    loss_fn = mean_row_loss(ready)

    @jax.jit
    def gradient(trained, batch):
        return jax.grad(lambda t: loss_fn(paths.merge(t, frozen), batch)[0])(trained)

    kept = []
    for step, rate in enumerate(rates):
        batch = jax.tree.map(lambda x: x[0], padded.batches(step, 1, batch_size=4, seed=5))
        update, state = adam.update(gradient(trained, batch), state)
        trained = jax.tree.map(lambda p, u, rate=rate: p - rate * u, trained, update)
        kept.append((trained, state))
    found = paths.split(params, LORA)[0]
    same = functools.partial(np.testing.assert_allclose, atol=1e-4)  # 1 % of the largest step
    jax.tree.map(same, found, trained)
    for epoch, weight in ((1, np.mean(rates[:2])), (2, np.mean(rates[2:]))):
        end = load_epoch(folder, lm, 8, RECIPE, epoch, seed=5)
        expected, state = kept[2 * epoch - 1]
        found = paths.split(end.params, LORA)[0]
        jax.tree.map(same, found, expected)
        inside = adam_state(end.opt_state)
        assert inside.count == 2 * epoch
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), inside.mu, state.mu)
        np.testing.assert_allclose(end.weight, weight, rtol=1e-6)


def test_training_that_was_stopped_goes_on(lm, warmup, tmp_path, monkeypatch) -> None:
    _, rows, whole = warmup
    save = less_training.Checkpoints.save

    def stop(self, step, state, record):
        save(self, step, state, record)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(less_training.Checkpoints, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, lm, rows, RECIPE, seed=5, keep=True)
    assert not (tmp_path / "checkpoints" / "4").exists()
    params = train(tmp_path, lm, rows, RECIPE, seed=5, keep=True)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert [each["step"] for each in read_lines(tmp_path / "metrics.jsonl")] == [
        1,
        2,
        3,
        4,
    ]


def test_features_are_projected_steps_of_adam(lm, sides, warmup, tmp_path, monkeypatch) -> None:
    """Against one gradient at a time, the step of optax, and the projection of all of it."""
    folder, _, _ = warmup
    end = load_epoch(folder, lm, 8, RECIPE, 1, seed=5)
    rows = Rows(sides[0].rows[:6])
    losses = row_losses(RECIPE.prepare(lm, 0))

    def write(place, adam):
        return store_features(
            place, losses, rows, end, FEATURES, RECIPE, number=1, adam=adam, pad_id=0
        )

    written = StoreWriter.append

    def stop(self, *args):  # after the first block
        written(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "adam", True)
    about = write(tmp_path / "adam", True)
    assert (about["rows"], about["skipped"]) == (6, 0)
    assert 0 <= about["eps_share"] < 1
    write(tmp_path / "sgd", False)
    stores = {kind: GradientStore.open(tmp_path / kind / "store") for kind in ("adam", "sgd")}
    assert stores["adam"].ids == [row.id for row in rows.rows]
    assert (stores["adam"].spec.gradient, stores["sgd"].spec.gradient) == ("adam paper", "sgd")
    assert stores["adam"].spec.weight == pytest.approx(0.005)
    lines = read_lines(tmp_path / "adam" / "info.jsonl")
    assert [line["id"] for line in lines] == stores["adam"].ids

    ready = RECIPE.prepare(lm, 0)
    trained, frozen = paths.split(end.params, LORA)
    adam = optax.scale_by_adam()
    state = adam_state(end.opt_state)

    @jax.jit
    def gradient(trained, ids):
        logp = jax.nn.log_softmax(ready.apply(paths.merge(trained, frozen), ids)[0, -2])
        return -logp[ids[0, -1]]

    project = projector("countsketch", 64, 0)
    for place in (0, 5):
        ids = np.array([rows.rows[place].ids])
        loss, one = jax.value_and_grad(gradient)(trained, ids)
        assert lines[place]["loss"] == pytest.approx(float(loss), rel=1e-5)
        step, _ = adam.update(one, state)
        for kind, tree in (("sgd", one), ("adam", step)):
            expected = project.project(jax.tree.map(lambda x: x[None], tree))[0]
            size = float(jnp.abs(expected).max())
            np.testing.assert_allclose(stores[kind][place], expected, atol=2e-4 * size)


def test_a_choice_is_written_best_first_and_ties_by_place(tmp_path) -> None:
    rows = [
        PoolRow(
            f"s{i}:{i}",
            (1, 2),
            (1,),
            source=f"s{i % 2}",
            text={"prompt": "é", "completion": "b"},
            noise=i == 2,
        )
        for i in range(4)
    ]
    made = write_choice(tmp_path, rows, np.array([0.5, 0.1, 0.9, 0.5]), 0.75)
    assert made == {"rows": 3, "sources": {"s0": 2, "s1": 1}, "noise": 1}
    lines = read_lines(tmp_path / "selected.jsonl")
    assert [line["id"] for line in lines] == ["s2:2", "s0:0", "s3:3"]
    assert lines[0] == {
        "id": "s2:2", "source": "s0", "score": 0.9, "prompt": "é", "completion": "b"
    }  # fmt: skip
    scores = [each["score"] for each in read_lines(tmp_path / "scores.jsonl")]
    assert scores == [0.5, 0.1, 0.9, 0.5]


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "no checksums"])
def test_a_choice_that_is_not_what_was_made_is_refused(tmp_path, damage) -> None:
    rows = [PoolRow(f"s:{i}", (1, 2), (1,), source="s", text={"prompt": "a"}) for i in range(4)]
    write_choice(tmp_path, rows, np.array([0.5, 0.1, 0.9, 0.5]), 0.75)
    assert [row.id for row in read_choice(tmp_path, rows)] == ["s:2", "s:0", "s:3"]
    path = tmp_path / "selected.jsonl"
    text = path.read_text()
    if damage == "cut":
        path.write_text("".join(text.splitlines(keepends=True)[:2]))
    elif damage == "changed":
        path.write_text(text.replace("s:3", "s:1"))
    elif damage == "gone":
        path.unlink()
    else:
        (tmp_path / "checksums.json").unlink()
    with pytest.raises(UserError, match=r"\.jsonl: damaged|checksums\.json: is missing"):
        read_choice(tmp_path, rows)


def answered(*answers: str | None) -> list[PoolRow]:
    texts = [{"messages": []} if each is None else {"completion": each} for each in answers]
    return [PoolRow(f"s:{i}", (1, 2), (1,), source="s", text=text) for i, text in enumerate(texts)]


def test_a_choice_may_have_the_answers_of_the_target(tmp_path) -> None:
    target = Rows(tuple(answered("yes", "no", "yes", "yes")))
    shares = shares_of_answers(target)
    assert shares == {"no": 0.25, "yes": 0.75}
    rows = answered("no", "yes", "maybe", "yes", "no", "yes", "yes", None)
    scores = np.array([0.9, 0.1, 1.0, 0.3, 0.8, 0.2, 0.2, 1.0])
    assert matched(rows, scores, 4, shares) == [0, 3, 5, 6]
    assert matched(rows, scores, 2, shares) == [0, 3]  # 0.5 and 1.5: the first of equal rests
    made = write_choice(tmp_path, rows, scores, 0.5, shares)
    assert made["rows"] == 4
    with pytest.raises(UserError, match=r"needs 4 rows with the answer 'no' \(got"):
        matched(rows, scores, 4, {"no": 1.0})
    with pytest.raises(UserError, match="the target has conversations"):
        shares_of_answers(Rows(tuple(answered(None))))


def test_a_study_from_rows_to_table(tiny_model, folder, tmp_path, monkeypatch) -> None:
    def train_once(place, lm, rows, recipe, *, seed, keep=False):
        """Train in the warm-up and on the first choice of LESS; other choices are measured only."""
        if keep or (place.name.startswith("tune-less") and len(rows) == 6):
            return train(place, lm, rows, recipe, seed=seed, keep=keep)
        return recipe.prepare(lm, seed).params

    monkeypatch.setattr(less, "train", train_once)
    methods = ("less", "random", "matched", "bm25", "representation")
    # All rows in one block; several are written below, where writing is stopped.
    features = dataclasses.replace(FEATURES, block_size=None)
    study = config(tmp_path, tiny_model, methods=methods, features=features)
    said: list[str] = []
    found = selection_study(study, base_dir=folder, say=said.append)
    assert "source none has no task.train: it is left out" in said
    assert found["pool"]["sources"] == {"right": 12, "noise": 12}
    assert [run["method"] for run in found["runs"]] == list(methods)
    assert all(run["rows"] == 6 for run in found["runs"])
    assert all(0 <= run["value"] <= 1 for run in found["runs"])

    # The scores are weighted cosines with the mean of the target, by NumPy from what is stored.
    def stored(side: str, epoch: int) -> np.ndarray:
        (place,) = (tmp_path / "seed-0").glob(f"{side}-{epoch}-*")
        return GradientStore.open(place / "store")[:].astype(np.float64)

    expected = 0
    rates = epoch_weights(RECIPE.optimizer_for(12), 2, 3)
    for epoch in (1, 2):
        rows, target = stored("train", epoch), stored("target", epoch).mean(axis=0)
        cosines = rows @ target / np.linalg.norm(rows, axis=1) / np.linalg.norm(target)
        expected = expected + rates[epoch - 1] * cosines
    (place,) = (tmp_path / "seed-0").glob("select-less-*")
    scores = [each["score"] for each in read_lines(place / "scores.jsonl")]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-7)

    text = markdown(found)
    assert "| no training " in text
    assert all(f"| {method} " in text for method in methods)

    # A second run does nothing; another fraction leaves warm-up and features as they are.
    said.clear()
    assert selection_study(study, base_dir=folder, say=said.append) == found
    assert not [line for line in said if "starts" in line or "resumes" in line]
    said.clear()
    study = dataclasses.replace(study, fraction=0.5, methods=("less",))
    selection_study(study, base_dir=folder, say=said.append)
    assert [line.split(":")[0] for line in said if "starts" in line] == ["select-less", "tune-less"]
    done = [line.split(":")[0] for line in said if "nothing has changed" in line]
    assert done == ["warmup", "train-1", "target-1", "train-2", "target-2", "before"]


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model whose tokenizer has an end of turns."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    return load_model(make_model(tmp_path_factory.mktemp("talker"), tokenizer))


def test_conversations_are_rows_and_those_cut_off_are_counted(talker, tmp_path) -> None:
    def row(question: str, answer: str, **more):
        turns = [("user", question), ("assistant", answer)]
        return {"messages": [{"role": r, "content": c} for r, c in turns], **more}

    long = " ".join(["film"] * 40)
    write_jsonl(
        tmp_path / "rows.jsonl",
        [
            row("it was", "good", id="x", subtask="b"),
            row(long, "bad"),
            row("it", "bad", subtask="a"),
        ],
    )
    reader = Reader(talker, 32, base_dir=tmp_path)
    found = reader.source("chat", Source(messages="rows.jsonl"))
    assert [each.id for each in found.rows] == ["chat:x", "chat:rows.jsonl:3"]
    assert found.cut == ("chat:rows.jsonl:2",)
    assert found.subtasks.tolist() == [1, 0]
    learnt = [found.rows[0].ids[place] for place in found.rows[0].loss_positions]
    assert talker.tokenizer.convert_ids_to_tokens(learnt) == ["good", "</s>"]
    measure = Measure.of(Target(messages="rows.jsonl"), talker, reader, batch_size=4)
    assert measure.metric == "loss"
    expected = brute_losses(talker, talker.params, found.rows).mean()
    assert measure.value(talker.params) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Source(), "task: a source has a task or messages. Give one of them."),
        (
            lambda: Source(messages="a", labels="shuffled"),
            "labels: there are no label words (got shuffled). Give own.",
        ),
        (lambda: Target(), "task: the target has a task or messages. Give one of them."),
        (
            lambda: Recipe(optimizer=Adam(warmup=3)),
            "optimizer.warmup: differs from stage to stage (got 3). Give recipe.warmup_share.",
        ),
    ],
)
def test_what_cannot_be_configured(make, sentence) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value) == sentence


def test_a_source_says_its_name(lm, folder) -> None:
    with pytest.raises(UserError, match=r"^sources\.a\.rows: 30 \+ 20 are asked for \(got 40\)"):
        Reader(lm, 32, base_dir=folder).source("a", Source(task=task(), rows=20, skip=30))


def test_the_cost_of_the_published_run() -> None:
    """By hand, with a Llama of 32 layers, width 4096 and 11008, and 300 tokens a row."""
    adapters = 32 * 4 * 2 * 4096 * 128
    assert adapter_size(LLAMA_7B, Recipe().peft) == adapters == 134_217_728
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    row = 300 * (4 * weights + 6 * adapters + 12 * 300 * 32 * 4096)
    assert row_flops(LLAMA_7B, Recipe().peft, 300) == row
    by_stage = {cost.stage: cost for cost in costs(Plan())}
    features = by_stage["features of the rows"]
    assert features.flops == 270_679 * 4 * (row + 14 * adapters)
    assert features.bytes == 270_679 * 4 * (2 * 8192 + 4)  # a float32 before each row
    assert round(features.bytes / 1e8) == 177  # the paper's 17.7 GB
    assert by_stage["warm-up"].flops == 13_533 * 4 * row
    assert by_stage["training on full"].flops == 270_679 * 4 * row
    twice = {
        cost.stage: cost for cost in costs(Plan(config=dataclasses.replace(PAPER, seeds=(0, 1))))
    }
    assert twice["scores"].flops == 2 * by_stage["scores"].flops
