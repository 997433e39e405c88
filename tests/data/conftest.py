"""Tiny tokenizers whose tokens are known by hand."""

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

BPE_WORDS = ["Ġit", "Ġwas", "Ġgreat", "Ġterrible", "Ġbad", "Ġbadly", "Ġfun", "fun"]
PIECES = ["fun", "it", "was", "great", "terrible", "bad", "##ly", "good", "##film", ".", ":", "?"]


def byte_level(*, bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE: one token for each of BPE_WORDS, else bytes and merges on the way to them."""
    vocab = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = []
    for word in BPE_WORDS:
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            if pair not in merges:
                merges.append(pair)
                vocab.append(word[: end + 1])
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos or eos:
        single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture(scope="session")
def bpe_bos() -> PreTrainedTokenizerFast:
    return byte_level(bos=True)


@pytest.fixture(scope="session")
def bpe_bos_eos() -> PreTrainedTokenizerFast:
    return byte_level(bos=True, eos=True)


@pytest.fixture(scope="session")
def wordpiece() -> PreTrainedTokenizerFast:
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES]
    tokenizer = Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def roberta_like() -> PreTrainedTokenizerFast:
    """Byte-level BPE with <s>, </s> and a <mask> that swallows the space before it."""
    tokenizer = byte_level(bos=True, eos=True)
    tokenizer.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True)})
    return tokenizer


class Characters(PreTrainedTokenizer):
    """A tokenizer without offsets: one token a character, a space goes with the next one."""

    def __init__(self, *, bos: bool, **kwargs: object) -> None:
        self._bos = bos
        mask = AddedToken("<mask>", lstrip=True)
        super().__init__(
            bos_token="<s>", eos_token="</s>", pad_token="<pad>", mask_token=mask, **kwargs
        )

    @property
    def vocab_size(self) -> int:
        return 512

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(256)} | {f" {chr(i)}": 256 + i for i in range(256)}

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        tokens: list[str] = []
        for character in text:
            if tokens and tokens[-1] == " ":
                tokens.pop()
                character = f" {character}"
            tokens.append(character)
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token[-1]) + 256 * (len(token) - 1)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index) if index < 256 else f" {chr(index - 256)}"

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.bos_token_id, *token_ids_0, self.eos_token_id] if self._bos else token_ids_0

    def get_special_tokens_mask(
        self, token_ids_0, token_ids_1=None, already_has_special_tokens=False
    ):
        special = {self.bos_token_id, self.eos_token_id}
        return [int(token in special) for token in token_ids_0]


@pytest.fixture(scope="session")
def slow() -> Characters:
    return Characters(bos=False)


@pytest.fixture(scope="session")
def slow_special() -> Characters:
    return Characters(bos=True)
