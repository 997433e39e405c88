"""The study of the bottleneck, on domains of different words."""

import json

import numpy as np
import pytest
import yaml

from jaxlm.cli.main import main
from jaxlm.core.errors import UserError
from jaxlm.models import from_pretrained
from jaxlm.studies.bottleneck import BottleneckConfig, encode
from tests.helpers.tiny import BAD, GOOD, write_jsonl

DOMAINS = {"bright": GOOD, "dull": BAD, "numbers": tuple("0123456789")}


@pytest.fixture
def path(tmp_path, tiny_model):
    generator = np.random.default_rng(0)
    for name, words in DOMAINS.items():
        texts = [" ".join(generator.choice(words, 7)) + "\nthe film" for _ in range(60)]
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts])
    keys = {
        "study": "bottleneck", "model": str(tiny_model), "corpus": str(tmp_path),
        "domains": [*DOMAINS], "words": 9, "train": 30, "test": 20, "books": 4, "pairs": 8,
        "size": 4, "steps": 20, "learning_rate": 20.0, "head_learning_rate": 0.1,
        "activations": [3, 20], "examples": [2], "seeds": [0, 1], "output": str(tmp_path / "out"),
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    return tmp_path / "study.yaml"


def test_every_class_is_forgotten_in_turn(path, capsys):
    assert main(["study", str(path), "--dry-run"]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [*DOMAINS]
    assert main(["study", str(path)]) == 0, capsys.readouterr().err
    folder = path.parent / "out"
    assert (folder / "activations.png").exists()
    found = json.loads((folder / "table.json").read_text())["methods"]

    def mean(method, name):
        assert np.shape(found[method][name]) == (2, 3)  # seeds, classes
        return np.mean(found[method][name])

    for began in ("bottleneck", "linear head"):
        assert mean(began, "forgotten") > 0.9
        # Every piece is of the forgotten class once, and of another one twice.
        assert mean(began, "forgotten") == pytest.approx(mean(began, "others"))
        assert mean(began, "relearned") == 0
    for method in ("bottleneck, logit removed", "linear head, row removed"):
        assert mean(method, "forgotten") == 0
        assert mean(method, "change") >= 0
        assert mean(method, "both") == 1
        assert mean(method, "relearned") > 0
    assert mean("bottleneck, retrained", "forgotten") == 0
    assert mean("by activations: 20", "forgotten") < mean("by activations: 3", "forgotten")
    assert mean("linear head, gradient ascent", "forgotten") < 0.1
    # Without values all logits are equal, and the first class is the answer.
    for method in ("bottleneck, untrained values", "linear head, untrained"):
        assert found[method]["forgotten"] == [[1, 0, 0]] * 2
    # A piece is projected to 4 numbers in 4 codebooks and compared with 8 keys.
    lookup = 4 * 4 * (16 + 8)
    assert mean("by activations: 3", "products") == 30 * lookup
    assert mean("by examples: 2", "products") == 2 * lookup
    assert mean("bottleneck, retrained", "encoded") == 60


def test_a_feature_is_the_mean_over_the_tokens_of_a_text(tiny_model):
    lm = from_pretrained(tiny_model)
    texts = ["the film", "the bright film number 3 was good"]
    ids = [lm.tokenizer(text)["input_ids"] for text in texts]
    alone = [np.asarray(lm.hidden(lm.params, np.array([row])))[0].mean(axis=0) for row in ids]
    np.testing.assert_allclose(encode(lm, texts), alone, rtol=1e-5, atol=1e-6)


def test_a_mistake_is_named(path, capsys):
    assert main(["study", str(path), "--train=50"]) == 2
    assert "domains: bright has 60 pieces (got train: 50 and test: 20)." in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^domains: must be at least two \(got one\)"):
        BottleneckConfig(corpus="c", domains=("one",), output="o")
