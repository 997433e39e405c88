import pytest

from jaxlm.data import Template
from tests.helpers.sentences import refused

SST2 = "*cls**sent_0*_It_was*mask*.*sep+*"
MNLI = "*cls**sent-_0*?*mask*,*+sentl_1**sep+*"
TREC = "*cls**mask*:*+sent_0**sep+*"


def render(template: str, label: str, columns: tuple[str, ...] = ("text",), **fields: str) -> str:
    return Template.parse(template).with_names(None, columns).render(fields, label).text


def test_braces() -> None:
    assert render("{text} It was {label}", "great", text="A joy.") == "A joy. It was great"
    assert render("{label}: {text}", "great", text="A joy.") == "great: A joy."
    assert render("{text} It was {mask}.", "great", text="A joy.") == "A joy. It was great."


def test_literal_braces_and_text_that_looks_like_a_template() -> None:
    assert render("{{{text}}} {label}", "a", text="{label}") == "{{label}} a"


def test_spans() -> None:
    template = Template.parse("Q: {question} P: {passage} A: {label}.")
    rendered = template.render({"question": "why", "passage": "no, why"}, "Yes")
    assert rendered.text == "Q: why P: no, why A: Yes."
    assert [rendered.text[a:b] for a, b in rendered.fields] == ["why", "no, why"]
    assert rendered.text[slice(*rendered.label)] == "Yes"
    assert rendered.fields == ((3, 6), (10, 17))


def test_field_names() -> None:
    template = Template.parse("{b} {a} {label} {b}")
    assert template.field_names == ("b", "a")
    assert template.render({"a": "x", "b": "y"}, "z").text == "y x z y"


def test_lm_bff() -> None:
    two = ("premise", "hypothesis")
    texts = {"premise": "He sleeps.", "hypothesis": "He is awake."}
    assert render(SST2, "great", text="A joy.") == "A joy. It was great."
    assert render(MNLI, "No", two, **texts) == "He sleeps? No, he is awake."
    assert render(TREC, "Human", text="Who?") == " Human: Who?"


def test_lm_bff_space_before_the_mask_is_one() -> None:
    assert render("*cls**sent_0*_is_*mask*.*sep+*", "bad", text="This") == "This is bad."


def test_lm_bff_letters() -> None:
    assert render("*sentl_0**mask*", "a", text="Ha") == "ha a"
    assert render("*sentu_0**mask*", "a", text="ha") == "Ha a"
    assert render("*+sentl-_0**mask*", "a", text="Ha.") == " ha a"
    assert render("*sentl-_0**mask*", "a", text="") == " a"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("idx", "sentence"), ("sentence",)),
        (("sentence", "text"), ("text",)),
    ],
)
def test_usual_names_of_one_sentence(columns: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert Template.parse(SST2).with_names(None, columns).field_names == expected


def test_usual_and_given_names_of_two_sentences() -> None:
    template = Template.parse(MNLI)
    columns = ("sentence1", "sentence2", "label")
    assert template.with_names(None, columns).field_names == ("sentence1", "sentence2")
    assert template.with_names(("b", "a"), ()).field_names == ("b", "a")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("It was good", "has no {label} (got 'It was good')"),
        ("{{label}}", "has no {label}"),
        ("*cls**sent_0*", "has no *mask*"),
        ("{label} {label}", "has several places for the label"),
        ("{text {label}", "has an unmatched brace"),
        ("{} {label}", "has a brace that is not a field's name alone"),
        ("{text!r} {label}", "has a brace that is not a field's name alone"),
        ("*cls**sent_0**sep+**sent_1**mask*", "goes on after *sep+*"),
        (f"*cls**sent_{'9' * 5000}**mask*", "numbers a sentence beyond 99"),
    ],
)
def test_malformed(template: str, said: str) -> None:
    with refused("task.template", said):
        Template.parse(template)


def test_too_few_names() -> None:
    with refused("task.fields", "has 2 sentences (got 1 fields)"):
        Template.parse(MNLI).with_names(("text",), ("text",))
