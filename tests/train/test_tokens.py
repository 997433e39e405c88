"""Words with tags from a plain encoder to a Hugging Face folder: train, evaluate, predict, save."""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.cli.main import main
from jaxlm.core.errors import UserError
from jaxlm.cost.plan import dry_run
from jaxlm.data.rows import PaddedRows, TokenRow
from jaxlm.models import LanguageModel, add_classifier, init_params
from jaxlm.sharding import mesh_from_text
from jaxlm.train.finetuning import FinetuneConfig
from jaxlm.train.load import load_model, with_token_head
from jaxlm.train.losses import accumulate, tagging_objective
from jaxlm.train.objectives import TokenClassification
from tests.helpers.models import CONFIG, GOLDEN
from tests.helpers.sentences import refused
from tests.helpers.tiny import make_masked, make_model, read_lines, write_jsonl

TAGS = {"good": "B-POS", "number": "I-POS", "bad": "B-NEG", "the": "O", "film": "O", "it": "O"}
NAMES = ("B-NEG", "B-POS", "I-POS", "O")
ADAM = {"name": "adam", "learning_rate": 3e-3}


def write_rows(folder: Path, name: str, count: int) -> str:
    numbers = np.random.default_rng(len(name))
    rows = []
    for _ in range(count):
        words = numbers.choice([*TAGS], numbers.integers(2, 8)).tolist()
        rows.append({"tokens": words, "tags": [TAGS[word] for word in words]})
    return str(write_jsonl(folder / f"{name}.jsonl", rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A BERT without a head, a decoder, and rows."""
    folder = tmp_path_factory.mktemp("tokens")
    bert = jaxlm.from_pretrained(GOLDEN / "bert-base").replace(tokenizer=make_masked())
    jaxlm.save_pretrained(bert, folder / "bert")
    make_model(folder / "llama")
    for name, count in (("train", 60), ("validation", 16), ("test", 16)):
        write_rows(folder, name, count)
    return folder


def data(folder: Path, **keys) -> dict:
    return {name: str(folder / f"{name}.jsonl") for name in ("train", "validation", "test")} | keys


@pytest.fixture(scope="module")
def run(folder):
    return jaxlm.finetune(
        model=str(folder / "bert"), tokens=data(folder), optimizer=ADAM, steps=60, eval_every=20,
        batch_size=8, output=str(folder / "run"),
    )  # fmt: skip


def test_a_new_head_is_trained(run, capsys):
    summary = run.summary
    assert (run.model.config.head, run.model.config.label_names) == ("token_classifier", NAMES)
    assert summary["config"]["tokens"]["labels"] == [*NAMES]
    assert summary["zero_shot"]["accuracy"] < summary["majority_accuracy"] + 0.2
    assert summary["test"]["accuracy"] > 0.9 > summary["majority_accuracy"]
    assert summary["test"]["f1"] > 0.8
    assert main(["finetune", f"{run.folder}/config.yaml"]) == 0
    table = capsys.readouterr().out
    for row in (
        "test F1",
        "test accuracy",
        "zero-shot, accuracy",
        "test accuracy, most frequent class",
    ):
        assert row in table


def test_evaluate_and_predict_say_what_the_run_measured(run, folder, tmp_path):
    output = tmp_path / "rows.jsonl"
    result = jaxlm.evaluate(run.folder, predictions=str(output))
    for name in ("f1", "accuracy"):
        assert result[name] == run.summary["test"][name]
    assert result["majority_accuracy"] == run.summary["majority_accuracy"]
    rows = read_lines(output)
    right = [a == b for row in rows for a, b in zip(row["prediction"], row["tags"], strict=True)]
    assert np.mean(right) == result["accuracy"]
    assert result["standard_error"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    assert jaxlm.predict(run.folder, folder / "test.jsonl") == rows
    ids = run.model.tokenizer([rows[0]["tokens"]], is_split_into_words=True)["input_ids"]
    shares = jax.nn.softmax(run.model.apply(run.model.params, np.array(ids)))[0, 1:-1]
    np.testing.assert_allclose(rows[0]["probabilities"], shares.max(axis=-1), rtol=1e-5)
    assert rows[0]["prediction"] == [NAMES[i] for i in shares.argmax(axis=-1)]


def test_rows_without_tags_and_words_that_are_not_read(run, tmp_path):
    rows = [{"tokens": ["good"] * 40, "id": 7}, {"tokens": [""]}, {"tokens": ["the", "", "film"]}]
    found = jaxlm.predict(run.folder, write_jsonl(tmp_path / "rows.jsonl", rows))
    read = [[each is not None for each in row["prediction"]] for row in found]
    assert read == [[True] * 14 + [False] * 26, [False], [True, False, True]]  # 16 positions
    assert [[x is not None for x in row["probabilities"]] for row in found] == read
    assert found[0]["id"] == 7


def test_a_saved_model_keeps_its_classes_and_its_head(run, folder, tmp_path):
    jaxlm.save_pretrained(run.model, tmp_path / "model")
    hf = json.loads((tmp_path / "model" / "config.json").read_text())
    assert hf["architectures"] == ["BertForTokenClassification"]
    assert hf["id2label"] == dict(zip("0123", NAMES, strict=True))
    again = jaxlm.evaluate(tmp_path / "model", tokens={"test": data(folder)["test"]})
    assert again["f1"] == run.summary["test"]["f1"]
    # The classes are matched by name, and a run goes on from the head that is there.
    more = jaxlm.finetune(
        model=str(tmp_path / "model"), tokens=data(folder, labels=NAMES[::-1]), steps=1,
        optimizer=ADAM, output=str(tmp_path / "more"),
    )  # fmt: skip
    assert more.summary["zero_shot"] == run.summary["test"]
    assert more.model.config.label_names == NAMES
    both = jaxlm.evaluate(run.folder, other=str(tmp_path / "more"))
    assert both["difference"]["accuracy"] == both["accuracy"] - both["other"]["accuracy"]
    write_jsonl(tmp_path / "other.jsonl", [{"tokens": ["good"], "tags": ["X"]}])
    with refused(f"{tmp_path}/other.jsonl, line 1", "'X'"):
        jaxlm.evaluate(tmp_path / "model", tokens={"test": str(tmp_path / "other.jsonl")})
    with refused("model", "its classes are not"):
        labels = {"test": str(tmp_path / "other.jsonl"), "labels": ["X"]}
        jaxlm.evaluate(tmp_path / "model", tokens=labels)
    with refused("model", "has no head to evaluate"):
        jaxlm.evaluate(tmp_path / "model", task="subj")
    with refused("model", "has no classifier of tokens"):
        jaxlm.evaluate(folder / "bert", tokens={"test": data(folder)["test"]})


def test_a_run_needs_its_data_no_more_and_refuses_other_rows(folder, tmp_path):
    for name in ("train", "validation", "test"):
        shutil.copy(folder / f"{name}.jsonl", tmp_path)
    keys = {"model": str(folder / "llama"), "tokens": data(tmp_path), "output": f"{tmp_path}/run"}
    keys |= {"optimizer": {"name": "mezo"}, "steps": 4, "batch_size": 4}
    run = jaxlm.finetune(**keys)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    replayed = load_model(run.folder)
    jax.tree.map(np.testing.assert_array_equal, replayed.params, run.model.params)
    assert replayed.config.label_names == NAMES
    write_rows(tmp_path, "test", 3)
    with refused("tokens.test", "has changed since the run"):
        jaxlm.evaluate(run.folder)
    (tmp_path / "train.jsonl").unlink()
    assert jaxlm.finetune(**keys).summary == run.summary


def test_an_adapter_is_trained_with_its_head(folder, tmp_path):
    """Which a folder of PEFT would leave out."""
    run = jaxlm.finetune(
        model=str(folder / "llama"), tokens=data(folder), peft="lora", optimizer=ADAM, steps=2,
        output=str(tmp_path / "run"),
    )  # fmt: skip
    begun = with_token_head(jaxlm.from_pretrained(folder / "llama"), NAMES, seed=0)
    same = jax.tree.map(np.array_equal, begun.params["classifier"], run.model.params["classifier"])
    assert not any(jax.tree.leaves(same))
    with refused("--adapter", "would leave out the head"):
        from jaxlm.cli import convert

        convert.run([str(tmp_path / "run"), str(tmp_path / "adapter"), "--adapter"])


@pytest.mark.multidevice
@pytest.mark.parametrize("model", ["bert", "llama"])
def test_a_mesh_gives_the_numbers_of_one_device(model, folder, tmp_path):
    found = []
    for name, mesh in (("one", None), ("eight", mesh_from_text("data=2,fsdp=2,model=2"))):
        run = jaxlm.finetune(
            model=str(folder / model), tokens=data(folder), optimizer=ADAM, steps=4, mesh=mesh,
            batch_size=8, output=str(tmp_path / name),
        )  # fmt: skip
        shown = jaxlm.evaluate(run.folder, mesh=mesh)
        found.append([*run.metrics["loss"], shown["accuracy"], shown["f1"]])
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_a_plan_needs_neither_weights_nor_a_tokenizer(folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    config = json.loads((folder / "bert" / "config.json").read_text())
    named = {"architectures": ["BertForTokenClassification"], "id2label": {"0": "O", "1": "B-X"}}
    (bare / "config.json").write_text(json.dumps(config | named))
    keys = {"model": str(bare), "optimizer": "adam", "output": f"{tmp_path}/run"}
    tokens = data(folder, labels=["O", "B-X", "I-X"])
    plan = dry_run(jaxlm.cli.config.from_call(FinetuneConfig, None, keys | {"tokens": tokens},
                                              "finetune")[0])  # fmt: skip
    shapes = {each.path: each.shape for each in plan.parameters}
    assert shapes["classifier.kernel"] == (24, 3)
    assert jaxlm.models.shapes_from_pretrained(bare).config.label_names == ("O", "B-X")


def test_the_loss_is_the_mean_over_the_words_and_parts_add_up_to_it():
    """In closed form, with the first token of a row in the loss, too."""
    config = CONFIG.replace(head="token_classifier", num_labels=3)
    lm = LanguageModel(config, init_params(config, jax.random.key(0)))
    rows = [
        TokenRow("a", (3, 4, 5), (0, 2), tags=(1, 2)),
        TokenRow("b", (6, 7, 8, 9, 5), (0, 1, 4), tags=(0, 0, 2)),
        TokenRow("c", (4,), (0,), tags=(1,)),
        TokenRow("d", (4, 8), (1,), tags=(0,)),
    ]
    batch = PaddedRows(rows, 0).batch(range(4))
    wanted = []
    for row in rows:
        logits = lm.apply(lm.params, np.array([row.ids]))[0]
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        wanted += [
            -log_probs[at, tag] for at, tag in zip(row.loss_positions, row.tags, strict=True)
        ]
    loss_fn = tagging_objective(lm.apply)
    loss, aux = loss_fn(lm.params, batch)
    assert loss == pytest.approx(np.mean(wanted), rel=1e-5)
    assert aux["tokens"] == 7
    parts, more = accumulate(loss_fn, 2, share=TokenClassification.share)(lm.params, batch)
    assert (parts, more["tokens"]) == (pytest.approx(float(loss), rel=1e-6), 7)
    assert more["accuracy"] == pytest.approx(float(aux["accuracy"]))


@pytest.mark.parametrize("name", ["llama", "bert-base", "modernbert"])
def test_packed_texts_do_not_see_each_other(name):
    lm = jaxlm.from_pretrained(GOLDEN / name)
    lm = add_classifier(lm, 3, jax.random.key(0), head="token_classifier")
    rows = [TokenRow("a", (3, 4, 5), (0, 2), tags=(1, 2)), TokenRow("b", (6, 7), (1,), tags=(0,))]
    whole = TokenRow("a b", (3, 4, 5, 6, 7), (0, 2, 4), starts=(0, 3), tags=(1, 2, 0))
    loss_fn = tagging_objective(lm.apply)
    apart, _ = loss_fn(lm.params, PaddedRows(rows, 0).batch([0, 1]))
    packed, _ = loss_fn(lm.params, PaddedRows([whole], 0, packed=True).batch([0]))
    assert packed == pytest.approx(float(apart), rel=1e-5)


def test_a_head_fits_its_classes_or_is_new(folder):
    lm = jaxlm.from_pretrained(folder / "bert")
    named = add_classifier(lm, 2, jax.random.key(3), ("O", "X"), head="token_classifier")
    kernel = named.params["classifier"]["kernel"]
    assert with_token_head(named, ("O", "X"), seed=0).params["classifier"]["kernel"] is kernel
    nameless = named.replace(config=named.config.replace(label_names=()))
    kept = with_token_head(nameless, ("B", "A"), seed=0)
    assert kept.params["classifier"]["kernel"] is kernel
    assert kept.config.label_names == ("B", "A")
    for names in (("X", "O"), ("O", "X", "Y")):
        new = with_token_head(named, names, seed=0)
        assert new.config.label_names == names
        assert not jnp.array_equal(new.params["classifier"]["kernel"][:, :2], kernel)


@pytest.mark.parametrize(
    ("keys", "key", "message"),
    [
        ({"objective": "completion"}, "objective", "completion reads task or messages or text"),
        ({"calibrate": True}, "calibrate", "needs the same options"),
        ({"monitor": "macro_f1"}, "monitor", "Choose one of f1, accuracy"),
        ({"tokens": {"labels": ["O"]}}, "tokens", "has no data"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(keys, key, message, folder, tmp_path):
    config = {"model": str(folder / "bert"), "optimizer": ADAM, "tokens": data(folder)}
    with pytest.raises(UserError, match=rf"^(arguments: )?{key}: .*{message}"):
        jaxlm.finetune(**config | {"output": str(tmp_path / "run")} | keys)


def test_evaluate_takes_a_task_or_words(folder):
    with pytest.raises(UserError, match=r"task: one of task and tokens must be given"):
        jaxlm.evaluate(folder / "bert")
    with pytest.raises(UserError, match=r"tokens: have neither prompts nor options"):
        jaxlm.evaluate(folder / "bert", tokens={"test": "a.jsonl"}, icl=4)


@pytest.mark.torch
@pytest.mark.parametrize("case", ["bert-tokens", "llama-tokens"])
def test_the_loss_is_that_of_transformers(case, tmp_path):
    """Which leaves out the tokens with the label -100."""
    import torch

    from tests.helpers import reference

    theirs = reference.make_model(case)
    theirs.save_pretrained(tmp_path)
    lm = jaxlm.from_pretrained(tmp_path)
    rows = [
        TokenRow("a", (5, 9, 6, 7), (1, 3), tags=(2, 0)),
        TokenRow("b", (8, 9, 10, 4), (0, 1, 2), tags=(1, 1, 2)),
    ]
    batch = PaddedRows(rows, 0, buckets=(4,)).batch([0, 1])
    labels = np.where(batch["weights"] > 0, batch["tags"], -100)
    tensors = [torch.from_numpy(np.int64(x)) for x in (batch["input_ids"], labels)]
    with torch.no_grad():
        wanted = theirs(input_ids=tensors[0], labels=tensors[1]).loss
    assert tagging_objective(lm.apply)(lm.params, batch)[0] == pytest.approx(
        float(wanted), abs=1e-5
    )
