"""The studies of preference pairs: what they write is what their pieces say, on a tiny model."""

import json

import numpy as np
import pytest
import yaml

from jaxlm import preference
from jaxlm.cli.main import main
from jaxlm.core.errors import UserError
from jaxlm.data import PairsConfig
from jaxlm.models import from_pretrained
from jaxlm.preference import PairScores
from jaxlm.studies import one_token
from jaxlm.studies.displacement import SCORES, DisplacementConfig, around, score_pairs
from jaxlm.studies.one_token import OneTokenConfig, OneTokenPair
from jaxlm.studies.ranking import RankingConfig, split_numbers
from tests.helpers.tiny import BAD, GOOD, make_model, make_tokenizer, read_lines, write_jsonl
from tests.preference.test_losses import SCORES as GOLDEN


def pairs(count: int) -> list[dict[str, str]]:
    rows = []
    for i in range(count):
        sides = [f" {(GOOD, BAD)[side][i % 4]}{' film' * (i % 3)}" for side in (0, 1)]
        rows.append(
            {"prompt": f"the film number {i % 10} was", "chosen": sides[0], "rejected": sides[1]}
        )
    return rows


@pytest.fixture
def folder(tmp_path, tiny_model):
    """A folder with pairs, and keys of a run on these."""
    write_jsonl(tmp_path / "train.jsonl", pairs(12))
    write_jsonl(tmp_path / "validation.jsonl", pairs(20)[12:])
    return tmp_path


def run_keys(folder, model):
    files = {split: f"{folder}/{split}.jsonl" for split in ("train", "validation")}
    return {
        "model": str(model),
        "pairs": {**files, "append_eos": False},
        "optimizer": {"name": "rmsprop", "learning_rate": 1e-3},
        "steps": 2,
        "batch_size": 4,
        "eval_every": 1,
    }


def write_study(folder, **keys):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**keys, "output": str(folder / "out")}, sort_keys=False))
    return str(path)


def table(folder):
    return json.loads((folder / "out" / "table.json").read_text())


def test_displacement_of_quantiles_and_variants(folder, tiny_model, capsys):
    path = write_study(
        folder, study="displacement", run=run_keys(folder, tiny_model), quantiles=[0, 1],
        pairs_per_quantile=4, sft={"steps": 1}, keep=0.5,
        variants={"kept": {"pairs.train": "kept.jsonl"},
                  "too fast": {"optimizer.learning_rate": 1e30}},
    )  # fmt: skip
    assert main(["study", path, "--dry-run"]) == 0
    runs = ("sft", "quantile-0", "quantile-1", "variants/kept", "variants/too_fast")
    listed = capsys.readouterr().out.splitlines()
    assert [
        line.split("seed-0/")[1].split("-4")[0][: len(run)]
        for line, run in zip(listed, runs, strict=True)
    ] == [*runs]
    assert main(["study", path]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    seed = folder / "out" / "seed-0"
    scores = read_lines(seed / "scores.jsonl")
    assert len(scores) == 12
    assert all(score.keys() == {"id", *SCORES} for score in scores)
    # The files of pairs are those of the lowest scores, and of the ends.
    order = np.argsort([score["ches"] for score in scores], kind="stable")
    given = read_lines(folder / "train.jsonl")
    for name, places in (
        ("kept", order[:6]),
        ("quantile-0", order[:4]),
        ("quantile-1", order[-4:]),
    ):
        assert read_lines(seed / f"{name}.jsonl") == [given[i] for i in sorted(places)]
    found = table(folder)
    row = found["quantiles"]["quantile-1"]
    last = read_lines(seed / "quantile-1" / "metrics.jsonl")[-1]
    assert last["step"] == 2
    assert row["chosen_change"]["by_seed"] == [last["validation_chosen_change"]]
    assert row["loss_before"]["mean"] == pytest.approx(np.log(2))
    assert found["variants"]["too fast"]["loss"]["mean"] is None
    assert "diverged" in shown
    assert set(found["scores"]) == set(SCORES)
    assert all((folder / "out" / f"{name}.png").exists() for name in ("training", "quantiles"))
    # What has ended is not trained again.
    assert main(["study", path]) == 0
    assert table(folder) == found


def test_scores_of_a_pair_alone_are_those_in_a_batch(folder, tiny_model):
    lm = from_pretrained(tiny_model)
    encoded = (
        PairsConfig(train=str(folder / "train.jsonl"), append_eos=False).load(seed=0).encode(lm)
    )
    found = score_pairs(lm, encoded, batch_size=5)
    for i, each in enumerate(encoded.train):
        states = []
        for target in each.targets:
            ids = np.array([[*each.input_ids[0], *target]])
            h = np.asarray(lm.hidden(lm.params, ids))[0]
            states.append(h[len(each.input_ids[0]) - 1 : -1].astype(np.float64))
        (w, n_w), (l, n_l) = ((h.sum(0), len(h)) for h in states)
        assert found["ches"][i] == pytest.approx(w @ l - w @ w, rel=1e-4, abs=1e-4)
        normalized = w @ l / (n_w * n_l) - w @ w / n_w**2
        assert found["ches_per_token"][i] == pytest.approx(normalized, rel=1e-4, abs=1e-4)
        last = states[0][-1] @ states[1][-1]
        assert found["last_hidden_inner_product"][i] == pytest.approx(last, rel=1e-4)
    one_word = [len(each.targets[0]) == 1 for each in encoded.train]
    # The answers' only token is the last one.
    assert any(one_word)
    assert np.all(found["ches"][one_word] == 0)


def test_ranking_over_training(folder, tiny_model, capsys):
    path = write_study(
        folder, study="ranking", run=run_keys(folder, tiny_model), seeds=[0, 1], groups=3
    )
    assert main(["study", path]) == 0, capsys.readouterr().err
    found = table(folder)
    for i in (0, 1):
        summary = json.loads((folder / "out" / f"seed-{i}" / "summary.json").read_text())
        validation = found["validation"]
        assert validation["trained"]["by_seed"][i] == pytest.approx(
            summary["test"]["ranking_accuracy"]
        )
        before = summary["zero_shot"]["ranking_accuracy"]
        assert validation["reference"]["by_seed"][i] == pytest.approx(before)
    assert len(found["train"]["groups"]) == 3
    assert all((folder / "out" / f"{name}.png").exists() for name in ("accuracy", "flips"))


def test_numbers_of_the_golden_vectors():
    run = {"pairs": {"train": "t", "validation": "v"}}
    config = RankingConfig(run=run, output="o", rate=0.75, groups=2)
    (dpo,) = preference.terms("dpo")
    found = split_numbers(config, PairScores(*map(np.asarray, GOLDEN[:6])), dpo)
    assert (found["reference"], found["trained"], found["reward_accuracy"]) == (0.75, 0.5, 0.5)
    # rc - rl is 2, -6.5, 3, 2.5; log odds of .75 are 1.1, so beta .1 adds 11 nats and 1 adds 1.1.
    assert found["idealized"] == {"0.01": 1, "0.1": 1, "1": 0.75, "5": 0.75, "10": 0.75}
    assert found["ideal"] == found["idealized"]["0.1"]
    assert (found["corrected"], found["spoiled"]) == (0, pytest.approx(1 / 3))
    assert [row["began_right"] for row in found["groups"]] == [0.5, 1]
    # -log sigmoid(.1 k) of k = 6.5 and -2; the losses are those of pairs 2 and 1.
    threshold = -np.log(1 / (1 + np.exp([-0.65, 0.2]))).mean()
    assert found["groups"][0]["threshold"] == pytest.approx(threshold)
    assert found["groups"][0]["loss"] == pytest.approx((0.668460 + 0.644397) / 2, abs=1e-6)


def test_one_token(tmp_path, capsys):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %} it was"
    model = make_model(tmp_path / "chat", tokenizer)
    path = write_study(
        tmp_path, study="one_token", model=str(model), steps=3, sft_steps=2, top=2,
        pairs=[{"prompt": "the film", "chosen": "good", "rejected": "bad"},
               {"prompt": "the film number 1", "chosen": "warm", "rejected": "cold"}],
        optimizer={"name": "sgd", "learning_rate": 0.05},
    )  # fmt: skip
    assert main(["study", path]) == 0, capsys.readouterr().err
    for row in table(tmp_path)["rows"]:
        # One step of gradient descent lowers the loss from log 2.
        assert row["loss"][0] == pytest.approx(np.log(2))
        assert row["loss"][1] < row["loss"][0]
        assert row["p_chosen"][1] / row["p_rejected"][1] > row["p_chosen"][0] / row["p_rejected"][0]
        assert (row["cosine"] > 0) == (row["p_chosen"][1] > row["p_chosen"][0])
        assert len(row["gained"]) == 2
    pair = OneTokenPair(prompt="the", chosen="good film", rejected="bad")
    with pytest.raises(UserError, match=r"^pairs.chosen: must be one token \(got 'good film'"):
        one_token.encode(from_pretrained(model), pair)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DisplacementConfig(run={}, output="o"), "run.pairs: is missing"),
        (
            lambda: RankingConfig(run={"pairs": {"train": "t"}}, output="o"),
            "run.pairs.validation: is missing",
        ),
        (lambda: OneTokenConfig(model="m", pairs=(), output="o"), "pairs: is empty"),
        (
            lambda: split_numbers(
                RankingConfig(run={"pairs": {"validation": "v"}}, output="o"),
                PairScores(*np.zeros((6, 3))),
                *preference.terms("dpo"),
            ),
            "groups: there are only 3 pairs",
        ),
        (lambda: around(0.5, np.zeros(3), 4), "pairs_per_quantile: there are only 3 pairs"),
    ],
)
def test_a_mistake_is_named(make, message):
    with pytest.raises(UserError, match=f"^{message}"):
        make()
