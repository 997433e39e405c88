"""Pretraining end to end on a few thousand parameters."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
import jaxlm.train.loop
from jaxlm.cli import config as configs
from jaxlm.cli.main import main
from jaxlm.core.errors import UserError
from jaxlm.data.corpus import Windows
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.pretraining import PretrainConfig, pretrain
from tests.helpers.tiny import sentences, write_corpus

YAML = """\
model: {{family: llama, hidden_size: 16, num_layers: 2, num_heads: 2, intermediate_size: 16,
        max_positions: 32}}
tokenizer: {folder}/tokenizer
corpus:
  path: {folder}/corpus
  held_out: held_out/films
  domains: [{{name: films, weight: 1}}, {{name: more, weight: 1, final_weight: 2}}]
optimizer: {{name: adamw, learning_rate: 3.0e-2, schedule: linear, warmup: 4}}
steps: 30
batch_size: 4
seq_len: 12
seed: 0
log_every: 2
eval_every: 10
checkpoint_every: 6
output: {folder}/run
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path)
    (tmp_path / "tiny.yaml").write_text(YAML.format(folder=tmp_path))
    return tmp_path


def load(folder: Path, **overrides: str) -> PretrainConfig:
    return configs.load(PretrainConfig, str(folder / "tiny.yaml"), overrides)


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_it_learns_and_leaves_a_model(folder):
    summary = pretrain(load(folder))
    rows = metrics(folder / "run")
    steps, measured = ([r for r in rows if name in r] for name in ("loss", "held_out_loss"))
    assert [row["step"] for row in steps] == list(range(1, 31))
    assert [row["step"] for row in measured] == [0, 10, 20, 30]
    assert {row["tokens"] for row in steps} == {4 * 12}
    assert summary["tokens"] == 30 * 4 * 12
    # 27 tokens, all alike at first
    assert steps[0]["loss"] == pytest.approx(np.log(27), rel=0.05)
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert summary["loss"] == pytest.approx((steps[-1]["loss"] + steps[-2]["loss"]) / 2)
    size, last = sum(len(row["text"]) for row in sentences(20)), measured[-1]
    nats = last["held_out_bits_per_byte"] * np.log(2) * size
    assert nats / last["held_out_loss"] == pytest.approx(5 * 20)  # words of each sentence
    assert summary["held_out_loss"] == last["held_out_loss"] < measured[1]["held_out_loss"]
    lm = jaxlm.from_pretrained(folder / "run" / "model")
    assert summary["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(lm.params))
    assert lm.tokenizer is not None
    assert summary == json.loads((folder / "run" / "summary.json").read_text())


def test_a_run_in_micro_batches_stops_early(folder):
    still = {"optimizer.learning_rate": "1e-30", "patience": "1", "accumulate": "2"}
    summary = pretrain(load(folder, **still))
    rows = metrics(folder / "run")
    assert (summary["steps"], summary["tested_step"], summary["stopped_early"]) == (10, 0, True)
    assert summary["tokens"] == sum(row.get("tokens", 0) for row in rows) == 10 * 4 * 12
    assert summary["held_out_loss"] == rows[0]["held_out_loss"]
    with pytest.raises(UserError, match=r"patience: .*there is no held-out text \(got 1\)"):
        load(folder, **{"patience": "1", "corpus.held_out": "null"})


def test_a_stopped_run_goes_on_to_the_same_numbers(folder, monkeypatch):
    pretrain(load(folder, output=str(folder / "whole")))
    batch = Windows.batch

    def stopping(self, step):
        if step == 17:
            raise KeyboardInterrupt
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Windows, "batch", stopping)
        with pytest.raises(KeyboardInterrupt):
            pretrain(load(folder))
    assert metrics(folder / "run")[-1]["step"] == 14  # beyond the checkpoint of step 12
    pretrain(load(folder))
    assert metrics(folder / "run") == metrics(folder / "whole")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        one, other = (folder / run / "model" / name for run in ("run", "whole"))
        assert one.read_bytes() == other.read_bytes()


def test_a_finished_run_is_shown_again_and_another_configuration_refused(folder, capsys):
    arguments = ["pretrain", str(folder / "tiny.yaml"), "--steps=4"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    (folder / "corpus" / "films.jsonl").unlink()
    assert main(arguments) == 0
    assert capsys.readouterr().out == shown
    assert main([*arguments, "--batch_size=5"]) == 2
    assert (
        "batch_size = 4 (got 5), which cannot change. Choose another output"
        in capsys.readouterr().err
    )


def test_of_a_run_that_diverged_the_last_parameters_before_are_the_model(folder, capsys):
    """From step 13 on the loss is said to be a thousand times what it is."""
    way = jaxlm.train.loop.many_steps

    def diverging(step):
        def run(state, batches):
            state, infos = way(step)(state, batches)
            late = state.opt_state[-1].count > 12
            return state, infos | {"loss": jnp.where(late, 1000.0, 1.0) * infos["loss"]}

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxlm.train.loop, "many_steps", diverging)
        summary = pretrain(load(folder))
    assert (summary["diverged_since"], summary["tested_step"]) == (13, 12)
    said = capsys.readouterr().err
    assert "diverged since step 13: lower optimizer.learning_rate\n" in said
    late = [row for row in metrics(folder / "run") if row["step"] > 12 and "loss" in row]
    assert {row.get("diverged_since") for row in late} == {13}
    kept = Checkpoints(folder / "run" / "checkpoints", read_only=True)
    assert kept.steps() == [12, 30]
    lm = jaxlm.from_pretrained(folder / "run" / "model")
    wanted = kept.read(12, "params")["params"]
    jax.tree.map(np.testing.assert_array_equal, lm.params, wanted)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"steps": "0"}, r"^.*: steps: must be from 1 to 1000000000 \(got 0\)\. Correct it\.$"),
        (
            {"model.num_heads": "3"},
            "model.hidden_size: must be an even multiple of num_heads, 3 .got 16",
        ),
        ({"model.num_layers": "0"}, "model.num_layers: must be from 1 to 16384 .got 0"),
        ({"seq_len": "33"}, "seq_len: must be at most model.max_positions, 32 .got 33"),
        ({"tokenizer": "nowhere"}, "tokenizer: has no tokenizer.json .got nowhere.. Train one"),
        ({"corpus.held_out": "none"}, "there is no none.jsonl or none.jsonl.gz"),
        ({"optimizer.name": "mezzo"}, "optimizer.name: is not known .got 'mezzo'"),
        (
            {"optimizer.learning_rate": "1e30"},
            "^optimizer.learning_rate: the run diverged .got a loss of nan at step",
        ),
    ],
)
def test_mistakes_are_told_in_one_sentence(folder, overrides, message):
    with pytest.raises(UserError, match=message):
        pretrain(load(folder, **overrides))
