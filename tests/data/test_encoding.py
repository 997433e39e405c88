import copy

import pytest

from jaxlm.core.errors import UserError
from jaxlm.data import Example, Template, encoding
from jaxlm.data.encoding import encode_all
from tests.helpers.sentences import refused


def encoded(template, tokenizer, example, labels, **options):
    return next(encode_all(template, tokenizer, [example], labels, **options))


def run(tokenizer, template, labels, *, kind="decoder", max_length=None, **fields):
    example = Example(fields, 0, "train.jsonl:1")
    return encoded(
        Template.parse(template), tokenizer, example, labels, kind=kind, max_length=max_length
    )


def words(tokenizer, rows) -> list[list[str]]:
    return [tokenizer.convert_ids_to_tokens(list(row)) for row in rows]


def test_label_word_takes_the_space_before_it(bpe) -> None:
    encoded = run(bpe, "{text} it was {label}", ["great", "terrible"], text="fun")
    assert words(bpe, encoded.input_ids) == [["fun", "Ġit", "Ġwas"]] * 2
    assert encoded.positions == ((2,), (2,))
    assert words(bpe, encoded.targets) == [["Ġgreat"], ["Ġterrible"]]
    assert encoded.token_type_ids is None


def test_first_token_is_the_one_the_tokenizer_adds(bpe_bos) -> None:
    encoded = run(bpe_bos, "{text} it was {label}", ["great", "bad"], text="fun")
    assert words(bpe_bos, encoded.input_ids) == [["<s>", "fun", "Ġit", "Ġwas"]] * 2
    assert encoded.positions == ((3,), (3,))
    assert words(bpe_bos, encoded.targets) == [["Ġgreat"], ["Ġbad"]]


def test_no_special_token_after_the_end_of_a_decoder(bpe_bos_eos) -> None:
    encoded = run(bpe_bos_eos, "{text} it was {label}", ["great", "bad"], text="fun")
    assert words(bpe_bos_eos, encoded.input_ids) == [["<s>", "fun", "Ġit", "Ġwas"]] * 2
    assert words(bpe_bos_eos, encoded.targets) == [["Ġgreat"], ["Ġbad"]]


def test_all_from_the_label_on_is_scored(bpe_bos) -> None:
    encoded = run(bpe_bos, "{text} was {label} fun.", ["great", "bad"], text="it")
    prompt = ["<s>", "i", "t", "Ġwas"]
    assert words(bpe_bos, encoded.input_ids) == [
        [*prompt, "Ġgreat", "Ġfun"],
        [*prompt, "Ġbad", "Ġfun"],
    ]
    assert words(bpe_bos, encoded.targets) == [["Ġgreat", "Ġfun", "."], ["Ġbad", "Ġfun", "."]]
    assert encoded.positions == ((3, 4, 5), (3, 4, 5))


def test_label_words_of_several_tokens(bpe) -> None:
    encoded = run(bpe, "{text} was {label}", ["great", "grey"], text="fun")
    assert words(bpe, encoded.targets) == [["Ġgreat"], ["Ġgre", "y"]]
    assert words(bpe, encoded.input_ids)[1] == ["fun", "Ġwas", "Ġgre"]
    assert encoded.positions == ((1,), (1, 2))


def test_a_space_that_is_a_token_of_its_own_belongs_to_the_prompt(bpe) -> None:
    encoded = run(bpe, "{text} was {label}", ["great", "awful"], text="fun")
    assert words(bpe, encoded.input_ids) == [["fun", "Ġwas"], ["fun", "Ġwas", "Ġ", "a", "w", "fu"]]
    assert words(bpe, encoded.targets) == [["Ġgreat"], ["a", "w", "fu", "l"]]
    assert encoded.positions == ((1,), (2, 3, 4, 5))


def test_label_words_with_a_common_first_token(bpe) -> None:
    encoded = run(bpe, "{text} was {label}", ["bad", "bad it"], text="fun")
    assert words(bpe, encoded.targets) == [["Ġbad"], ["Ġbad", "Ġit"]]


def test_a_token_that_holds_the_end_of_the_prompt_is_scored_with_the_label(bpe) -> None:
    """The token "fun" begins before the label "un": it ends after its first character."""
    encoded = run(bpe, "{text} f{label}", ["un", "at"], text="fun")
    assert words(bpe, encoded.targets) == [["Ġfun"], ["a", "t"]]
    assert words(bpe, encoded.input_ids) == [["fun"], ["fun", "Ġf", "a"]]


def test_label_first_needs_a_token_before_it(bpe, bpe_bos) -> None:
    encoded = run(bpe_bos, "{label}: {text}", ["great", "fun"], text="it")
    assert words(bpe_bos, encoded.targets)[1] == ["fun", ":", "Ġit"]
    assert encoded.positions[1] == (0, 1, 2)
    with pytest.raises(UserError, match=r"^train.jsonl:1: has no token before the label word"):
        run(bpe, "{label}: {text}", ["great", "fun"], text="it")
    with pytest.raises(UserError, match=r"^task.labels: a word has no token \(got ''\)"):
        run(bpe, "{text}{label}", ["", "fun"], text="it")


def test_a_call_of_the_tokenizer_has_few_strings(bpe, monkeypatch) -> None:
    """Their offsets take much memory: the number of label words counts, not that of examples."""
    monkeypatch.setattr(encoding, "_CHUNK", 6)
    sizes = []
    read = encoding._rows_by_offsets
    monkeypatch.setattr(
        encoding, "_rows_by_offsets", lambda *a: sizes.append(len(a[1])) or read(*a)
    )
    examples = [Example({"text": f"it {i}"}, 0, f"x:{i}") for i in range(5)]
    template = Template.parse("{text} was {label}")
    found = list(encode_all(template, bpe, examples, ["great", "bad", "fun"], kind="decoder"))
    assert sizes == [6, 6, 3]
    assert [row.input_ids for row in found] == [
        next(encode_all(template, bpe, [one], ["great", "bad", "fun"], kind="decoder")).input_ids
        for one in examples
    ]


def test_empty_text(bpe) -> None:
    encoded = run(bpe, "{text} was {label}", ["great", "bad"], text="")
    assert words(bpe, encoded.input_ids) == [["Ġwas"]] * 2


@pytest.mark.parametrize("text", ["naïve 東京 🎬", "a  b \n", "🎬", "ﬁn"])
def test_unicode_is_bytes(bpe, text: str) -> None:
    encoded = run(bpe, "{text} was {label}", ["great", "bé"], text=text)
    prompt = bpe(text + " was")["input_ids"]
    assert list(encoded.input_ids[0]) == prompt
    assert encoded.positions[0] == (len(prompt) - 1,)
    assert bpe.decode(list(encoded.targets[1])) == " bé"


def test_truncation_takes_from_the_longest_field(bpe_bos) -> None:
    template = "{a} it {b} was {label}"
    fields = {"a": "fun fun fun fun", "b": "bad bad"}
    labels = ["great", "terrible bad"]
    full = words(bpe_bos, run(bpe_bos, template, labels, **fields).input_ids)
    whole = ["<s>", "fun", "Ġfun", "Ġfun", "Ġfun", "Ġit", "Ġbad", "Ġbad", "Ġwas"]
    assert full == [whole, [*whole, "Ġterrible"]]
    encoded = run(bpe_bos, template, labels, max_length=8, **fields)
    short = ["<s>", "fun", "Ġfun", "Ġit", "Ġbad", "Ġbad", "Ġwas"]
    assert words(bpe_bos, encoded.input_ids) == [short, [*short, "Ġterrible"]]
    assert words(bpe_bos, encoded.targets) == [["Ġgreat"], ["Ġterrible", "Ġbad"]]
    assert encoded.positions == ((6,), (6, 7))


def test_truncation_after_the_label(bpe_bos) -> None:
    encoded = run(
        bpe_bos, "it was {label}: {a}", ["great", "bad"], max_length=7, a="fun fun fun fun"
    )
    prompt = ["<s>", "i", "t", "Ġwas"]
    assert words(bpe_bos, encoded.input_ids)[0] == [*prompt, "Ġgreat", ":", "Ġfun"]
    assert words(bpe_bos, encoded.targets)[0] == ["Ġgreat", ":", "Ġfun", "Ġfun"]


@pytest.mark.parametrize("length", range(3, 12))
def test_truncated_rows_have_the_longest_length_allowed(bpe_bos, length: int) -> None:
    text = "fun was bad, 東京 it fun"
    encoded = run(bpe_bos, "{a} was {label}", ["great", "terrible"], max_length=length, a=text)
    assert len(encoded.input_ids[0]) == length
    assert words(bpe_bos, encoded.input_ids)[0][-1] == "Ġwas"
    assert words(bpe_bos, encoded.targets) == [["Ġgreat"], ["Ġterrible"]]


def test_no_room_for_the_template(bpe_bos) -> None:
    run(bpe_bos, "{text} it was {label}", ["great", "bad"], max_length=3, text="fun")
    with refused(
        "task.template", "longer than task.max_length or the model allows (got 2 tokens too many)"
    ):
        run(bpe_bos, "{text} it was {label}", ["great", "bad"], max_length=1, text="fun")


def test_mask_of_wordpiece(wordpiece) -> None:
    encoded = run(
        wordpiece, "{text} It was {mask}.", ["great", "terrible"], kind="encoder", text="Goodfilm"
    )
    row = ["[CLS]", "good", "##film", "it", "was", "[MASK]", ".", "[SEP]"]
    assert words(wordpiece, encoded.input_ids) == [row] * 2
    assert encoded.positions == ((5,), (5,))
    assert words(wordpiece, encoded.targets) == [["great"], ["terrible"]]
    assert encoded.token_type_ids == ((0,) * 8,) * 2


def test_mask_of_byte_level_takes_the_space(roberta_like) -> None:
    encoded = run(
        roberta_like, "{text} it was {label}.", ["great", "bad"], kind="encoder", text="fun"
    )
    expected = ["<s>", "fun", "Ġit", "Ġwas", "<mask>", ".", "</s>"]
    assert words(roberta_like, encoded.input_ids) == [expected] * 2
    assert words(roberta_like, encoded.targets) == [["Ġgreat"], ["Ġbad"]]
    assert list(encoded.input_ids[0]) == roberta_like("fun it was <mask>.")["input_ids"]
    assert encoded.token_type_ids is None


def test_mask_first_in_lm_bff_syntax_has_the_word_with_a_space(roberta_like) -> None:
    template = Template.parse("*cls**mask*:*+sent_0**sep+*").with_names(None, ["text"])
    example = Example({"text": "fun"}, 1, "x:1")
    row = encoded(template, roberta_like, example, ["great", "bad"], kind="encoder")
    assert words(roberta_like, row.input_ids)[0] == ["<s>", "<mask>", ":", "Ġfun", "</s>"]
    assert words(roberta_like, row.targets) == [["Ġgreat"], ["Ġbad"]]
    assert row.label == 1


def test_truncation_keeps_mask_and_end_of_an_encoder(wordpiece) -> None:
    encoded = run(
        wordpiece,
        "{text} it was {mask}.",
        ["great", "bad"],
        kind="encoder",
        max_length=7,
        text="fun fun fun",
    )
    row = ["[CLS]", "fun", "it", "was", "[MASK]", ".", "[SEP]"]
    assert words(wordpiece, encoded.input_ids) == [row] * 2
    assert encoded.positions == ((4,), (4,))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["great", "badly"], "one token (got 'badly', 2 tokens)"),
        (["great", "xyz"], "unknown to the tokenizer (got 'xyz')"),
        (["great", "Great"], "the same tokens (got 'great' and 'Great')"),
    ],
)
def test_label_words_an_encoder_cannot_have(wordpiece, labels: list[str], said: str) -> None:
    with refused("task.labels", said):
        run(wordpiece, "{text} was {label}.", labels, kind="encoder", text="it")


def test_an_encoder_needs_a_mask_token(bpe) -> None:
    with refused("tokenizer", "has no mask token"):
        run(bpe, "{text} was {label}.", ["great", "bad"], kind="encoder", text="it")


def test_text_that_holds_a_mask_token_is_not_the_label(wordpiece) -> None:
    encoded = run(
        wordpiece, "{text} was {mask}.", ["great", "bad"], kind="encoder", text="[MASK] it"
    )
    row = ["[CLS]", "[MASK]", "it", "was", "[MASK]", ".", "[SEP]"]
    assert words(wordpiece, encoded.input_ids)[0] == row
    assert encoded.positions == ((4,), (4,))


def test_without_offsets_the_label_is_what_the_prompt_lacks(slow, slow_special) -> None:
    encoded = run(slow, "{text} is {label}", ["ok", "bad"], text="it")
    assert words(slow, encoded.input_ids) == [
        ["i", "t", " i", "s", " o"],
        ["i", "t", " i", "s", " b", "a"],
    ]
    assert words(slow, encoded.targets) == [[" o", "k"], [" b", "a", "d"]]
    assert encoded.positions == ((3, 4), (3, 4, 5))
    encoded = run(slow_special, "{text} is {label}", ["ok", "bad"], text="it")
    assert words(slow_special, encoded.targets) == [[" o", "k"], [" b", "a", "d"]]
    assert words(slow_special, encoded.input_ids)[0] == ["<s>", "i", "t", " i", "s", " o"]


def test_without_offsets_truncation_and_mask(slow_special) -> None:
    encoded = run(slow_special, "{text} is {label}", ["ok", "bad"], max_length=6, text="it")
    assert words(slow_special, encoded.input_ids) == [
        ["<s>", "i", " i", "s", " o"],
        ["<s>", "i", " i", "s", " b", "a"],
    ]
    encoded = run(slow_special, "{text} is {label}.", ["a", "b"], kind="encoder", text="it")
    row = ["<s>", "i", "t", " i", "s", "<mask>", ".", "</s>"]
    assert words(slow_special, encoded.input_ids) == [row] * 2
    assert words(slow_special, encoded.targets) == [[" a"], [" b"]]
    with pytest.raises(UserError, match=r"one token \(got 'bad', 3 tokens\)"):
        run(slow_special, "{text} is {label}.", ["a", "bad"], kind="encoder", text="it")


def test_many_examples_are_as_one_by_one(bpe_bos, monkeypatch) -> None:
    monkeypatch.setattr(encoding, "_CHUNK", 4)
    template = Template.parse("{text} it was {label}.")
    labels = [f"word{i}" for i in range(5)]
    examples = [Example({"text": "fun " * (i % 7)}, i % 2, f"x:{i}") for i in range(11)]
    options = {"kind": "decoder", "max_length": 12}
    together = list(encode_all(template, bpe_bos, examples, labels, **options))
    assert together == [encoded(template, bpe_bos, e, labels, **options) for e in examples]


def test_truncation_and_padding_stored_with_a_tokenizer_do_not_count(bpe_bos) -> None:
    stored = copy.deepcopy(bpe_bos)
    stored.backend_tokenizer.enable_truncation(4)
    stored.backend_tokenizer.enable_padding(length=32)
    fields = {"text": "fun fun fun fun fun"}
    encoded = run(stored, "{text} it was {label}", ["great", "bad"], **fields)
    assert encoded == run(bpe_bos, "{text} it was {label}", ["great", "bad"], **fields)
    assert len(encoded.input_ids[0]) == 8
