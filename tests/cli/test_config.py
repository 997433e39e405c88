"""YAML and flags become dataclasses by the types that they declare."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from jaxlm.artifacts.config import build
from jaxlm.artifacts.keys import listing
from jaxlm.cli import config as configs
from jaxlm.core.checks import whole
from jaxlm.core.errors import UserError
from jaxlm.train.finetuning import FinetuneConfig
from jaxlm.train.run_folder import differences, to_dict
from tests.helpers.sentences import check_sentence


@dataclass(frozen=True)
class Inner:
    name: str = "inner"
    rate: float = 0.5


@dataclass(frozen=True)
class Other:
    name: str
    depth: int = 1


@dataclass(frozen=True)
class Strict:
    least: int = 0
    most: int = 9

    def __post_init__(self):
        whole(self, "least", "most", least=0)


@dataclass(frozen=True)
class Part:
    name: str
    size: int = 1


@dataclass(frozen=True)
class Needs:
    part: Part
    count: int = 1


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
    several: tuple[Inner | Other, ...] = field(
        default=(Inner(),), metadata={"registry": {"inner": Inner, "other": Other}}
    )
    strict: Strict = Strict()
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


def test_flags_override_the_file(tmp_path):
    config = load(tmp_path, "inner: {rate: 1}\nwords: [a]", inner__rate="1e-2", words="[b, c]")
    assert (config.inner.rate, config.words) == (0.01, ("b", "c"))


def test_a_flag_in_braces_is_text_where_text_is_wanted(tmp_path):
    assert load(tmp_path, "", inner__name="{text} it was {label}").inner.name.startswith("{text}")


def test_the_name_chooses_the_dataclass(tmp_path):
    assert load(tmp_path, "chosen: {name: other, depth: 2}").chosen == Other("other", 2)
    assert load(tmp_path, "chosen: {rate: 2}").chosen == Inner(rate=2.0)
    assert load(tmp_path, "chosen: other").chosen == Other("other")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("other", (Other("other"),)),
        ("{rate: 2}", (Inner(rate=2.0),)),
        ("[other]", (Other("other"),)),
        ("[{name: other, depth: 2}, inner]", (Other("other", 2), Inner())),
        ("[]", ()),
    ],
)
def test_one_or_a_list_of_several(tmp_path, text, values):
    for config in (load(tmp_path, f"several: {text}"), load(tmp_path, "", several=text)):
        assert config.several == values
        (tmp_path / "again.yaml").write_text(configs.dump(config))
        assert configs.load(Outer, tmp_path / "again.yaml") == config
    assert load(tmp_path, "several: {rate: 2}", several__rate="3").several == (Inner(rate=3.0),)


def test_the_help_of_a_list_names_its_default():
    text = listing(Outer)
    assert "  several: inner | other = inner\n" in text
    assert "  several.rate: float = 0.5 (inner)\n" in text


def test_a_section_may_be_made_by_a_function(tmp_path):
    assert load(tmp_path, "made: {rate: 2}").made == Inner(rate=2.0)


@pytest.mark.parametrize(
    ("text", "key", "part"),
    [
        ("cuont: 1", "cuont", "Did you mean count?"),
        ("inner: {ratio: 1}", "inner.ratio", "Did you mean inner.rate?"),
        ("zzzzzzzz: 1", "zzzzzzzz", "The keys are words, count"),
        ("depth: 3", "depth", "Did you mean chosen.depth?"),
        ("deqth: 3", "deqth", "Did you mean chosen.depth?"),
        ("chosen: {depth: 3}", "chosen.depth", "The keys are name, rate."),
        ("kind: medium", "kind", "(got 'medium'). Choose one of small, large."),
        ("kind: [small]", "kind", "(got a list)"),
        ("kind: {small: 1}", "kind", "(got a section)"),
        ("chosen: third", "chosen.name", "(got 'third'). Choose one of inner, other."),
        ("chosen: othr", "chosen.name", "(got 'othr'). Did you mean other?"),
        ("several: third", "several.name", "(got 'third'). Choose one of inner, other."),
        ("several: [inner, {name: other, depth: x}]", "several[1].depth", "(got 'x')"),
        ("several: [inner, {ratio: x}]", "several[1].ratio", "Did you mean several[1].rate?"),
        ("several: [[inner]]", "several", "must be a section (got a list)"),
        ("chosen: {name: [other]}", "chosen.name", "(got a list)"),
        ("chosen: {name: other, depth: deep}", "chosen.depth", "(got 'deep')"),
        ("flag: 1", "flag", "must be true or false (got '1')"),
        ("flag: [true]", "flag", "(got a list)"),
        ("inner: [1]", "inner", "must be a section (got a list)"),
        ("words: {a: b}", "words", "must be a list (got a section). Write [a, b]."),
        ("words: [[a]]", "words[0]", "must be a text in UTF-8 without NUL (got a list)"),
        ("count: null", "count", "must be a whole number (got 'null')"),
        ("count: inf", "count", "(got 'inf')"),
        ("count: 1e400", "count", "(got '1e400')"),
        (f"count: {'9' * 5000}", "count", f"(got '{'9' * 56}...)"),
        ("inner: {rate: nan}", "inner.rate", "must be a finite number (got 'nan')"),
        ("inner: {rate: -inf}", "inner.rate", "(got '-inf')"),
        ('inner: {name: "a\\0b"}', "inner.name", "(got 'a\\x00b')"),
        ('inner: {name: "\\ud800"}', "inner.name", "(got '\\ud800')"),
        ("inner: {rate: 1}\ncount: 2\ninner: {}", "inner", "twice (got lines 1 and 3)"),
        ("inner:\n  rate: 1\n  rate: 2", "rate", "twice (got lines 2 and 3)"),
        ("inner: {rate: 1, rate: 2}", "rate", "twice (got lines 1 and 1)"),
        ("words: " + "[" * 50_000, "sections", "nested too deeply"),
        ("words: &a [*a]", "config", "is not valid YAML"),
        ("- a", "config", "is not a mapping"),
        ("strict: {most: -1}", "strict.most", "must be from 0 to"),
    ],
)
def test_a_mistake_names_the_key_and_the_file(tmp_path, text, key, part):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    check_sentence(str(caught.value), key)
    assert part in str(caught.value)
    assert str(tmp_path / "c.yaml") in str(caught.value)


def test_a_misspelt_key_is_matched_with_the_keys_of_every_level():
    with pytest.raises(UserError, match=r"Did you mean optimizer\.learning_rate\?$"):
        configs.load(FinetuneConfig, None, {"lerning_rate": "1"})


def test_aliases_that_unfold_without_an_end_are_refused(tmp_path):
    """Ten levels of ten aliases are 10^10 values in a file of 300 bytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for i in range(1, 10):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]")
    with pytest.raises(UserError, match="aliases: unfold to too many values"):
        load(tmp_path, "\n".join(lines))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_read(tmp_path, kind):
    path = tmp_path / "c.yaml"
    if kind == "pipe":
        os.mkfifo(path)  # nobody writes there: reading would wait for ever
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(UserError, match=r"c\.yaml: (not a regular file|cannot be read)"):
        configs.load(Outer, path)


def test_a_dataclass_that_checks_itself_is_named_by_its_place_in_a_list(tmp_path):
    """It knows the section by its own name alone: `loss.beta`."""
    loss = "objective: {name: preference, loss: [sft, {name: dpo, beta: 0}]}"
    (tmp_path / "c.yaml").write_text(f"pairs: {{train: a}}\noutput: x\n{loss}")
    with pytest.raises(UserError) as caught:
        configs.load(FinetuneConfig, tmp_path / "c.yaml")
    check_sentence(str(caught.value), "objective.loss[1].beta")


def test_a_flag_is_blamed_and_not_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("limit: 3\nstrict: {least: 1}")
    for flags, key in (
        ({"count": "many"}, "count"),
        ({"inner.ratio": "1"}, "inner.ratio"),
        ({"inner": "{rate: x}"}, "inner.rate"),
        ({"words": "[[a]]"}, "words[0]"),
        ({"strict.most": "-1"}, "strict.most"),
        ({"chosen.name": "other", "chosen.depth": "x"}, "chosen.depth"),
    ):
        with pytest.raises(UserError) as caught:
            configs.load(Outer, tmp_path / "c.yaml", flags)
        assert check_sentence(str(caught.value), key)["where"] == "command line", flags
    (tmp_path / "c.yaml").write_text("strict: {most: -1}")
    with pytest.raises(UserError, match=r"c\.yaml: strict\.most: must be from 0 to"):
        configs.load(Outer, tmp_path / "c.yaml", {"strict.least": "1"})


def test_a_required_key_of_a_section_that_flags_made_is_missing_there(tmp_path):
    (tmp_path / "c.yaml").write_text("count: 3")
    for path, where in ((None, "command line"), (tmp_path / "c.yaml", "command line")):
        with pytest.raises(UserError) as caught:
            configs.load(Needs, path, {"part.size": "3"})
        assert check_sentence(str(caught.value), "part.name")["where"] == where


@pytest.mark.parametrize(
    "words",
    [
        ["--steps=1", "--steps=2"],
        ["--batch-size=1", "--batch_size=2"],
        ["--model=a", "--steps", "1", "--steps", "1"],
    ],
)
def test_a_flag_stands_once(words):
    with pytest.raises(UserError, match=r"is given twice \(got "):
        configs.parse_args(words)


def test_a_section_and_a_part_of_it_are_not_both_flags(tmp_path):
    with pytest.raises(UserError, match=r"--inner: contains --inner\.rate"):
        load(tmp_path, "", inner__rate="1", inner="{name: a}")


def test_the_home_folder_is_known_in_both_spellings(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("count: 7")
    path, flags = configs.parse_args(["--config=~/c.yaml"])
    assert configs.load(Outer, path, flags).count == 7
    with pytest.raises(UserError, match="config: there is no such user"):
        configs.parse_args(["~nosuchuser/c.yaml"])


def test_arguments():
    words = ["c.yaml", "--a.b=1", "--c-d", "2", "--e", "-3"]
    assert configs.parse_args(words) == ("c.yaml", {"a.b": "1", "c_d": "2", "e": "-3"})
    assert configs.parse_args(["--config", "c.yaml"]) == ("c.yaml", {})
    assert configs.parse_args([]) == (None, {})


def test_numbers_of_python_are_read_like_text():
    task = {"name": "subj", "k": 4, "validation": None}
    data = {"task": task, "steps": 2, "calibrate": True, "optimizer": {"learning_rate": 1e-3}}
    text = {"task": {"name": "subj", "k": "4", "validation": "null"}, "steps": "2"}
    text |= {"calibrate": "true", "optimizer": {"learning_rate": "0.001"}}
    there = {"output": "runs/x"}
    assert build(FinetuneConfig, data | there, "") == build(FinetuneConfig, text | there, "")
    with pytest.raises(UserError, match=r"steps: must be a whole number .got '2\.5'"):
        build(FinetuneConfig, data | there | {"steps": 2.5}, "")


def test_a_dictionary_and_back(tmp_path):
    config = load(tmp_path, "words: [a, b]\ninner: {rate: 2}")
    assert to_dict(config)["words"] == ["a", "b"]
    (tmp_path / "again.yaml").write_text(configs.dump(config))
    assert configs.load(Outer, tmp_path / "again.yaml") == config
    other = load(tmp_path, "words: [a, b]\ninner: {rate: 3}")
    assert list(differences(config, other)) == [("inner.rate", 2.0, 3.0)]


@pytest.mark.parametrize("name", ["subj", "mr_few_shot", "opt125m_sst2"])
def test_the_examples_are_configurations(name):
    path = Path(__file__).parents[2] / "configs" / "mezo" / f"{name}.yaml"
    config = configs.load(FinetuneConfig, path)
    assert config.optimizer.name == "mezo"
    assert len(config.task.labels) == 2
