"""Conversations: the text of the formats, and which tokens are learnt."""

import json

import pytest

from jaxlm.core.errors import UserError
from jaxlm.data import messages
from jaxlm.data.messages import (
    Conversation,
    Message,
    MessagesConfig,
    chat,
    encode_messages,
    prompt_of,
    tulu,
)
from tests.helpers.sentences import refused

TURNS = (
    Message("system", "it was"),
    Message("user", "  fun?\n"),
    Message("assistant", "\nfun great "),
    Message("user", "bad"),
    Message("assistant", "it was badly\nfun"),
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversation(*turns: tuple[str, str], name: str = "a") -> Conversation:
    return Conversation(tuple(Message(*turn) for turn in turns), name)


def learnt(tokenizer, encoded) -> list[str]:
    return tokenizer.convert_ids_to_tokens([encoded.ids[place] for place in encoded.loss_positions])


def with_template(tokenizer, template: str):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_the_tulu_format_to_the_letter() -> None:
    text, spans = tulu(TURNS, "</s>")
    assert text == (
        "<|system|>\nit was\n"
        "<|user|>\nfun?\n"
        "<|assistant|>\nfun great</s>\n"
        "<|user|>\nbad\n"
        "<|assistant|>\nit was badly\nfun</s>\n"
    )
    assert [text[a:b] for a, b in spans] == ["fun great</s>", "it was badly\nfun</s>"]


def test_every_answer_is_learnt_with_its_eos_and_nothing_else(bpe_bos) -> None:
    (encoded,) = encode_messages([Conversation(TURNS, "a")], bpe_bos)
    # "Ċ" is a line break; at its beginning a line has no Ġ word.
    assert learnt(bpe_bos, encoded) == [
        *("fun", "Ġgreat", "</s>"),
        *("i", "t", "Ġwas", "Ġbadly", "Ċ", "fun", "</s>"),
    ]
    assert bpe_bos.convert_ids_to_tokens(list(encoded.ids))[:4] == ["<s>", "<", "|", "s"]
    assert bpe_bos.decode(encoded.ids[-1:]) == "\n"
    assert len(encoded.ids) - 1 not in encoded.loss_positions


@pytest.mark.parametrize("name", ["bpe", "bpe_bos", "bpe_bos_eos", "roberta_like"])
def test_places_are_those_of_prefixes_tokenised_alone(name, request) -> None:
    """As the reference code finds them, by the lengths of texts that end where an answer does."""
    tokenizer = request.getfixturevalue(name)
    (encoded,) = encode_messages([Conversation(TURNS, "a")], tokenizer)
    text, spans = tulu(TURNS, "</s>")
    first = 0 if name == "bpe" else 1

    def count(end: int) -> int:
        return first + len(tokenizer(text[:end], add_special_tokens=False)["input_ids"])

    expected = [place for a, b in spans for place in range(count(a), count(b))]
    assert list(encoded.loss_positions) == expected
    assert len(encoded.ids) == count(len(text))


def test_a_chat_template_has_the_places_that_transformers_gives(bpe) -> None:
    tokenizer = with_template(bpe, CHATML)
    turns = [each._asdict() for each in TURNS]
    theirs = tokenizer.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    (encoded,) = encode_messages([Conversation(TURNS, "a")], tokenizer, template="chat")
    assert list(encoded.ids) == list(theirs["input_ids"])
    expected = [i for i, learnt in enumerate(theirs["assistant_masks"]) if learnt]
    assert list(encoded.loss_positions) == expected
    assert len(expected) > 20


@pytest.mark.parametrize("template", ["chat", "tulu", "plain"])
@pytest.mark.parametrize("begin", ["bpe", "bpe_bos"])
@pytest.mark.parametrize("written", ["{{ bos_token }}", ""])
def test_a_prompt_is_what_stands_before_an_answer_in_training(
    template, begin, written, request
) -> None:
    tokenizer = with_template(request.getfixturevalue(begin), written + CHATML)
    turns = [Message("user", "the film"), Message("assistant", "good"), Message("user", "a book")]
    whole = [Conversation((*turns, Message("assistant", "bad")), "0")]
    (row,) = encode_messages(whole, tokenizer, template=template)
    prompt = prompt_of(turns, tokenizer, template)
    prompt = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    assert tuple(prompt) == row.ids[: len(prompt)]
    last = [place for place in row.loss_positions if place >= len(prompt)]
    assert last[0] == len(prompt)


def test_a_chat_template_adds_no_special_tokens_of_its_own(bpe_bos) -> None:
    tokenizer = with_template(bpe_bos, "{{ bos_token }}" + CHATML)
    (encoded,) = encode_messages([Conversation(TURNS, "a")], tokenizer, template="chat")
    assert encoded.ids.count(tokenizer.bos_token_id) == 1


def test_what_is_too_long_loses_its_end(bpe_bos) -> None:
    whole = conversation(("user", "it"), ("assistant", "fun great"))
    (full,) = encode_messages([whole], bpe_bos)
    first = full.loss_positions[0]
    (part,) = encode_messages([whole], bpe_bos, max_length=first + 2)
    assert (part.ids, part.loss_positions) == (full.ids[: first + 2], (first, first + 1))
    (cut,) = encode_messages([whole], bpe_bos, max_length=first)
    assert (cut.ids, cut.loss_positions) == (full.ids[:first], ())


def test_an_empty_answer_is_its_eos(bpe_bos) -> None:
    (encoded,) = encode_messages([conversation(("user", "it"), ("assistant", "  "))], bpe_bos)
    assert learnt(bpe_bos, encoded) == ["</s>"]


def test_without_an_answer_nothing_is_learnt(bpe_bos) -> None:
    (encoded,) = encode_messages([conversation(("user", "it"))], bpe_bos)
    assert encoded.loss_positions == ()


def test_many_are_encoded_as_one_at_a_time(bpe_bos, monkeypatch) -> None:
    many = [conversation(("user", "it" * n), ("assistant", "fun")) for n in range(11)]
    alone = [row.ids for each in many for row in encode_messages([each], bpe_bos)]
    monkeypatch.setattr(messages, "_CHUNK", 4)
    assert [row.ids for row in encode_messages(many, bpe_bos)] == alone


def read(folder, *rows) -> tuple[Conversation, ...]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return MessagesConfig(train="rows.jsonl").load(seed=0, base_dir=folder).train


def test_rows_have_their_id_or_their_place(tmp_path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    first, second = read(
        tmp_path,
        {"messages": messages, "id": "flan_1", "subtask": "x"},
        {"messages": messages, "dataset": "d"},
    )
    assert first == Conversation((Message("user", "a"), Message("assistant", "b")), "flan_1", "x")
    assert (second.id, second.subtask) == ("rows.jsonl:2", "")


def test_a_prompt_and_its_completion_are_a_conversation(tmp_path) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    first, second = read(
        tmp_path,
        {"prompt": "a", "completion": "b"},
        {"prompt": turns, "completion": [{"role": "assistant", "content": "b"}]},
    )
    assert first.messages == (Message("user", "a"), Message("assistant", "b"))
    assert second.messages == (Message("system", "s"), *first.messages)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "has no messages"),
        ({"messages": []}, "has no messages"),
        ({"prompt": "a"}, "has no messages"),
        ({"prompt": "a", "completion": 1}, "message 2 has no content"),
        ({"messages": [{"role": "human", "content": "a"}]}, "message 1 has an unknown role"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 has no content"),
    ],
)
def test_rows_that_are_no_conversations(row, said, tmp_path) -> None:
    with refused("rows.jsonl, line 1", said):
        read(tmp_path, row)


def test_tokenizers_that_do_not_serve(bpe, slow) -> None:
    one = [conversation(("user", "it"), ("assistant", "fun"), name="rows:7")]
    with pytest.raises(UserError, match="character offsets"):
        encode_messages(one, slow)
    with pytest.raises(UserError, match=r"^template: the tokenizer has no chat template"):
        encode_messages(one, bpe, template="chat")
    without = with_template(bpe, CHATML)
    without.eos_token = None
    with pytest.raises(UserError, match="no eos_token"):
        encode_messages(one, without)


def test_a_template_that_rewrites_turns_is_refused(bpe) -> None:
    last_only = (
        "{% for m in messages %}[{{ m['role'] }}]{% if loop.last %}{{ m['content'] }}{% endif %}"
        "{% endfor %}"
    )
    with pytest.raises(UserError, match="message 3 differently when others follow it"):
        chat(TURNS, with_template(bpe, last_only))
    refusing = "{{ raise_exception('Only users speak') }}"
    with pytest.raises(UserError, match=r"does not take the conversation \(Only users speak\)"):
        chat(TURNS, with_template(bpe, refusing))
