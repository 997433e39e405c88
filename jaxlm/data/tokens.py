"""Words with tags: a class of each word, as in named-entity recognition.

A word is one or several tokens. As in transformers' examples, the first of them stands for the
word: the loss and the predictions are there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from jaxlm.core import checks
from jaxlm.core.errors import UserError
from jaxlm.data.rows import EncodedRows, TokenRow
from jaxlm.data.sources import Record
from jaxlm.data.splits import Texts, TextsConfig

TAGS = ("tags", "ner_tags")
_CHUNK = 512  # texts per call of the tokenizer


@dataclass(frozen=True)
class Tagged:
    """The words of a text and their tags.

    Attributes:
        words: at least one.
        tags: the class of each word, by its name or its index; empty where it is to be predicted.
        id: the row's source and number; `where` is the same in words.
        names: names of the classes whose index a tag is, if the source has them.
    """

    words: tuple[str, ...]
    tags: tuple[str | int, ...]
    id: str
    where: str = ""
    names: tuple[str, ...] = ()

    @property
    def text(self) -> tuple[str, ...]:
        """Everything that a model reads."""
        return self.words

    @property
    def content(self) -> tuple[Any, ...]:
        """Everything but the id."""
        return (self.words, self.tags)


@dataclass(frozen=True, kw_only=True)
class TokensConfig(TextsConfig):
    """The section `tokens` of a configuration: words with tags, to classify each word.

    Attributes:
        field: field of a row that holds the list of its words.
        tags_field: field with the list of their tags, names of classes or indices; by default
            `tags` or `ner_tags`.
        labels: names of the classes, in the order of the indices; by default those of the data set,
            or of the model, or the tags of the training rows, sorted. A model that has these
            classes keeps its head.
    """

    field: str = "tokens"
    tags_field: str | None = None
    labels: tuple[str, ...] | None = None

    key: ClassVar[str] = "tokens"
    objective: ClassVar[str] = "token_classification"
    kinds: ClassVar[tuple[str, ...]] = ("decoder", "encoder")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels is not None:
            checks.distinct("tokens.labels", self.labels)

    def parse_words(self, record: Record) -> Tagged:
        """Return the words in a row; its tags are not read."""
        words = record.values.get(self.field)
        if not words or not _all(words, str):
            raise UserError(
                f"{record.where}: field {self.field!r} is not a list of words (got "
                f"{checks.show(words)}). Name the field of the words in tokens.field."
            )
        return Tagged(tuple(words), (), f"{record.source}:{record.number}", record.where)

    def parse(self, record: Record) -> Tagged:
        """Return the words in a row and their tags.

        Raises:
            UserError: a field is missing or is not a list, or there are not as many tags as words.
        """
        tagged = self.parse_words(record)
        field = self.tags_field or next((x for x in TAGS if x in record.values), TAGS[0])
        tags = record.values.get(field)
        if tags is None or not _all(tags, str | int):
            raise UserError(
                f"{record.where}: field {field!r} is not a list of tags (got {checks.show(tags)}). "
                "Name the field of the tags in tokens.tags_field."
            )
        if len(tags) != len(tagged.words):
            raise UserError(
                f"{record.where}: must have as many tags as words, {len(tagged.words)} (got "
                f"{len(tags)}). Correct it."
            )
        return replace(tagged, tags=tuple(tags), names=record.class_names.get(field, ()))

    def classes(self, texts: Texts, model: Any) -> tuple[str, ...]:
        """Return the names of the classes, in the order of the outputs of the model's head."""
        given = self.labels or next((x.names for x in texts.train + texts.test if x.names), ())
        tags = {tag for example in texts.train for tag in example.tags}
        if not given and not any(isinstance(tag, int) for tag in tags):
            given = tuple(sorted(tags))
        if not (names := matched(given, model)):
            raise UserError(
                "tokens.labels: nothing names the classes, neither the data nor the model (got "
                "none). Give their names, in the order of the indices."
            )
        return names

    def resolve(self, texts: Texts, model: Any) -> tuple[Texts, tuple[str, ...]]:
        """See `TextsConfig`; tags become indices of the classes."""
        classes = self.classes(texts, model)
        place = {name: i for i, name in enumerate(classes)}

        def index(example: Tagged, tag: str | int) -> int:
            names = example.names or self.labels or classes
            name = names[tag] if isinstance(tag, int) and 0 <= tag < len(names) else tag
            if name not in place:
                raise UserError(
                    f"{example.where}: has a tag that is none of {checks.show(', '.join(classes))} "
                    f"(got {checks.show(tag)}). Correct it, or name the classes in tokens.labels."
                )
            return place[name]

        def indexed(examples: Sequence[Tagged]) -> tuple[Tagged, ...]:
            return tuple(replace(x, tags=tuple(index(x, tag) for tag in x.tags)) for x in examples)

        splits = map(indexed, (texts.train, texts.validation, texts.test))
        return Texts(self, *splits), classes

    def tokenize(self, examples: Sequence[Tagged], tokenizer: Any, limit: int) -> list[TokenRow]:
        """Return rows with the first token of each word in the loss; tags must be indices."""
        rows = []
        texts = encode_words([example.words for example in examples], tokenizer, limit)
        for example, (ids, places, words) in zip(examples, texts, strict=True):
            tags = tuple(int(example.tags[word]) for word in words)
            rows.append(TokenRow(example.id, ids, places, tags=tags))
        return rows

    def unread(self, length: int) -> EncodedRows:
        """See `TextsConfig`; the configuration must name the classes."""
        if self.labels is None:
            raise UserError(
                "tokens.labels: is needed where the model has no tokenizer (got null). Give the "
                "names of the classes."
            )
        row = TokenRow("", (0,) * length, tuple(range(length)), tags=(0,) * length)
        splits = {"train": [row], "validation": [], "test": [row]}
        options: dict[str, Any] = {"packing": self.packing, "labels": self.labels}
        return EncodedRows.pad(splits, pad_id=0, limit=length, key=self.key, **options)


def _all(values: Any, kind: Any) -> bool:
    return isinstance(values, list | tuple) and all(
        isinstance(value, kind) and not isinstance(value, bool) for value in values
    )


def matched(names: tuple[str, ...], model: Any) -> tuple[str, ...]:
    """Return the classes of the model's head, in its order, if all names are among them."""
    own = model.label_names if model.head == "token_classifier" else ()
    return own if {*names} <= {*own} else names


class Pieces(NamedTuple):
    """The tokens of a text, the places of the first token of each word, and which words these are.

    A word that was cut or has no token is not there.
    """

    ids: tuple[int, ...]
    places: tuple[int, ...]
    words: tuple[int, ...]


def encode_words(texts: Sequence[Sequence[str]], tokenizer: Any, limit: int) -> Iterator[Pieces]:
    """Tokenize texts that are split into words, of at most `limit` tokens with special ones."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "tokenizer: does not tell words apart, which tokens need. Add tokenizer.json."
        )
    if limit <= (special := tokenizer.num_special_tokens_to_add()):
        raise UserError(
            f"tokens.max_length: leaves no room for words beside {special} special tokens (got "
            f"{limit}). Raise it."
        )
    before = " " if _reads_spaces(tokenizer) else ""
    for start in range(0, len(texts), _CHUNK):
        chunk = [
            [words[0], *(before + word for word in words[1:])]
            for words in texts[start : start + _CHUNK]
        ]
        encodings = tokenizer(
            chunk, is_split_into_words=True, truncation=True, max_length=limit, verbose=False
        ).encodings
        for encoding in encodings:
            first: dict[int, int] = {}
            for place, word in enumerate(encoding.word_ids):
                if word is not None:
                    first.setdefault(word, place)
            yield Pieces(tuple(encoding.ids), tuple(first.values()), tuple(first))


def _reads_spaces(tokenizer: Any) -> bool:
    """Return whether words need a space before them to become the tokens that they are in a text.

    So it is with byte-level tokenizers without `add_prefix_space`, which join split words.
    """

    def ids(text: Any, **options: Any) -> Any:
        return tokenizer(text, add_special_tokens=False, **options)["input_ids"]

    split, spaced = ids([["a", "a"], ["a", " a"]], is_split_into_words=True)
    return bool(split != spaced == ids("a a"))
