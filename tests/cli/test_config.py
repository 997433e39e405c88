"""YAML and flags become dataclasses by the types that they declare."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from jaxlm.cli import config as configs
from jaxlm.core.errors import UserError
from jaxlm.train.run import FinetuneConfig


@dataclass(frozen=True)
class Inner:
    name: str = "inner"
    rate: float = 0.5


@dataclass(frozen=True)
class Other:
    name: str
    depth: int = 1


@dataclass(frozen=True)
class Outer:
    words: tuple[str, ...] = ()
    count: int = 3
    limit: int | None = 5
    flag: bool = False
    kind: Literal["small", "large"] = "small"
    inner: Inner = Inner()
    chosen: Inner | Other = field(
        default=Inner(), metadata={"registry": {"inner": Inner, "other": Other}}
    )
    made: Inner = field(default=Inner(), metadata={"make": lambda values: Inner(**values)})


def load(tmp_path: Path, text: str, **flags: str) -> Outer:
    (tmp_path / "c.yaml").write_text(text)
    dotted = {key.replace("__", "."): value for key, value in flags.items()}
    return configs.load(Outer, tmp_path / "c.yaml", dotted)


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3"])
def test_every_spelling_of_a_number_is_one(tmp_path, text):
    assert load(tmp_path, f"inner: {{rate: {text}}}").inner.rate == 1e-3


@pytest.mark.parametrize(("text", "value"), [("1e3", 1000), ("12", 12), ("2.0", 2), ("-1", -1)])
def test_whole_numbers(tmp_path, text, value):
    assert load(tmp_path, f"count: {text}").count == value


def test_words_stay_words(tmp_path):
    assert load(tmp_path, "words: [yes, no, 1, true, null]").words == (
        "yes", "no", "1", "true", "null",
    )  # fmt: skip


def test_null_where_it_is_allowed(tmp_path):
    assert load(tmp_path, "limit: null").limit is None
    assert load(tmp_path, "limit:").limit is None
    with pytest.raises(UserError, match=r"c\.yaml: count is 'null': give a whole number\.$"):
        load(tmp_path, "count: null")


def test_flags_override_the_file(tmp_path):
    config = load(tmp_path, "inner: {rate: 1}\nwords: [a]", inner__rate="1e-2", words="[b, c]")
    assert (config.inner.rate, config.words) == (0.01, ("b", "c"))


def test_a_flag_in_braces_is_text_where_text_is_wanted(tmp_path):
    assert load(tmp_path, "", inner__name="{text} it was {label}").inner.name.startswith("{text}")


def test_the_name_chooses_the_dataclass(tmp_path):
    assert load(tmp_path, "chosen: {name: other, depth: 2}").chosen == Other("other", 2)
    assert load(tmp_path, "chosen: {rate: 2}").chosen == Inner(rate=2.0)
    assert load(tmp_path, "chosen: other").chosen == Other("other")
    with pytest.raises(UserError, match=r"unknown chosen 'third': choose one of inner, other\.$"):
        load(tmp_path, "chosen: third")


def test_a_section_may_be_made_by_a_function(tmp_path):
    assert load(tmp_path, "made: {rate: 2}").made == Inner(rate=2.0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("cuont: 1", "unknown key 'cuont': did you mean 'count'?"),
        ("inner: {ratio: 1}", "unknown key 'inner.ratio': did you mean 'rate'?"),
        ("zzzzzzzz: 1", "unknown key 'zzzzzzzz': the keys are words, count"),
        ("kind: medium", "kind is 'medium': choose one of small, large."),
        ("flag: 1", "flag is '1': give true or false."),
        ("inner: [1]", "inner is a list: give a section of keys."),
        ("words: {a: b}", "words is a section: give a list [a, b]."),
        ("words: [[a]]", "words[0] is a list: give text."),
        ("chosen: {name: other, depth: deep}", "chosen.depth is 'deep': give a whole number."),
        ("- a", "not a configuration"),
    ],
)
def test_what_does_not_fit_is_said_with_the_file(tmp_path, text, sentence):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'c.yaml'}: {sentence}")


def test_arguments():
    words = ["c.yaml", "--a.b=1", "--c-d", "2", "--e", "-3"]
    assert configs.parse_args(words) == ("c.yaml", {"a.b": "1", "c_d": "2", "e": "-3"})
    assert configs.parse_args(["--config", "c.yaml"]) == ("c.yaml", {})
    assert configs.parse_args([]) == (None, {})


def test_a_dictionary_and_back(tmp_path):
    config = load(tmp_path, "words: [a, b]\ninner: {rate: 2}")
    assert configs.to_dict(config)["words"] == ["a", "b"]
    other = load(tmp_path, "words: [a, b]\ninner: {rate: 3}")
    assert list(configs.differences(config, other)) == [("inner.rate", 2.0, 3.0)]


@pytest.mark.parametrize("name", ["subj", "mr_few_shot", "opt125m_sst2"])
def test_the_examples_are_configurations(name):
    path = Path(__file__).parents[2] / "configs" / "mezo" / f"{name}.yaml"
    config = configs.load(FinetuneConfig, path)
    assert config.optimizer.name == "mezo"
    assert len(config.task.labels) == 2
