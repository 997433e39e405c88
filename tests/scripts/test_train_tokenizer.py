"""The byte-level BPE of the shipped model."""

import gzip
import json
import sys

import pytest
from transformers import AutoTokenizer

from scripts import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    text = "It's a great film .\nit was terrible , it was great\n" * 20
    line = json.dumps({"text": text}) + "\n"
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    out = folder / "out"
    arguments = ["--corpus", str(folder), "--out", str(out), "--vocab-size", "300"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_tokenizer.py", *arguments])
        train_tokenizer.main()
    return AutoTokenizer.from_pretrained(out)


def test_sequences_start_with_eos_and_end_without(tokenizer):
    ids = tokenizer("it was great")["input_ids"]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert ids[0] == 0
    assert 0 not in ids[1:]


def test_case_and_place_in_the_sentence_do_not_matter(tokenizer):
    def tokens(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert tokens("Great film") == tokens("great film")
    assert tokens("it was great")[-1:] == tokens("GREAT")


def test_every_byte_is_kept(tokenizer):
    text = "naïve \u2014 5 \u20ac , \U0001f600 !"
    assert tokenizer.decode(tokenizer(text)["input_ids"][1:]).strip() == text
