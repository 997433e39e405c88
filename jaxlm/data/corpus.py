"""Running text for pretraining: tokenised once, memory-mapped, drawn by step and seed alone.

A corpus is a folder of `<domain>.jsonl` or `<domain>.jsonl.gz` files, one document a line in the
field `text`; the lines of a document are its sentences. Shapes: B windows of a batch, T1 their
length, N tokens, S sentences.
"""

import dataclasses
import functools
import gzip
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from jaxlm.core.errors import UserError
from jaxlm.artifacts.processes import is_first, meet

DOCUMENTS_AT_ONCE = 1000


@dataclasses.dataclass(frozen=True)
class Domain:
    """One domain's share of the windows, moving linearly from `weight` to `final_weight`.

    Attributes:
      name: of the file `<name>.jsonl` or `<name>.jsonl.gz`.
      weight: share at the first step; the weights of all domains are divided by their sum.
      final_weight: share at the last step; None keeps `weight`.
    """

    name: str
    weight: float
    final_weight: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("weight", self.weight), ("final_weight", self.final_weight)):
            if value is not None and not 0 <= value < np.inf:
                raise UserError(f"{name} of domain '{self.name}' is {value:g}: give 0 or more.")

    @property
    def last_weight(self) -> float:
        """The share at the last step."""
        return self.weight if self.final_weight is None else self.final_weight


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one domain.

    Attributes:
      ids: token ids, each document after one `boundary`.
      starts: increasing indices into `ids` of the first token of each sentence.
      boundary: id of the token that starts a document.
      size: bytes of the text as the tokenizer's normaliser leaves it (lower-cased, say).
    """

    ids: Integer[np.ndarray, "N"]
    starts: Int[np.ndarray, "S"]
    boundary: int
    size: int

    def window(self, start: int, length: int) -> Int[np.ndarray, "length"]:
        """`boundary`, then `length - 1` tokens from `start`, going round at the end."""
        index = (start + np.arange(length - 1)) % len(self.ids)
        return np.concatenate([[self.boundary], self.ids[index]]).astype(np.int32)


def read_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer in `folder`.

    Raises:
      UserError: there is none.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"tokenizer {folder}: there is no tokenizer.json: train one.")
    return AutoTokenizer.from_pretrained(folder)


def tokenize(path: Path, tokenizer: Any) -> Tokens:
    """Tokenises one file of documents; within a document, line ends become spaces.

    Args:
      path: a `.jsonl` or `.jsonl.gz` file.
      tokenizer: a transformers tokenizer that reports offsets.

    Raises:
      UserError: the file or a line of it cannot be read, or the tokenizer does not serve.
    """
    boundary = tokenizer.eos_token_id
    if boundary is None:
        raise UserError("the tokenizer has no eos_token, which sets documents apart: add one.")
    if len(tokenizer) > 2**16:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens: give one of at most 65536.")
    normalizer = tokenizer.backend_tokenizer.normalizer
    ids: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    total = size = 0
    documents = _documents(path)
    while lines := list(itertools.islice(documents, DOCUMENTS_AT_ONCE)):
        texts = [" ".join(document) for document in lines]
        encoded = tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for document, text, tokens, offsets in zip(
            lines, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            if not tokens:
                continue
            first_characters = np.cumsum([0] + [len(line) + 1 for line in document[:-1]])
            ends = np.array(offsets)[:, 1]
            starts.append(np.searchsorted(ends, first_characters, side="right") + total + 1)
            ids.append(np.array([boundary, *tokens], np.uint16))
            total += len(tokens) + 1
            size += len((normalizer.normalize_str(text) if normalizer else text).encode())
    if not ids:
        raise UserError(f'{path} has no text: write {{"text": "..."}} on each line.')
    return Tokens(np.concatenate(ids), np.unique(np.concatenate(starts)), boundary, size)


def _documents(path: Path) -> Iterator[list[str]]:
    """The lines of each document that are not empty."""
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as records:
        try:
            for record in records:
                if record.strip():
                    text = json.loads(record)["text"]
                    yield [line for line in text.split("\n") if line.strip()]
                number += 1
        except (ValueError, LookupError, TypeError, AttributeError, EOFError, OSError, zlib.error):
            where = f"{path}, line {number + 1},"
            raise UserError(f'{where} is no document: write {{"text": "..."}} on each.') from None


def find(folder: Path, name: str) -> Path:
    """The file of domain `name` in `folder`.

    Raises:
      UserError: there is none.
    """
    for suffix in (".jsonl", ".jsonl.gz"):
        if (folder / (name + suffix)).is_file():
            return folder / (name + suffix)
    raise UserError(f"{folder} has no {name}.jsonl or {name}.jsonl.gz: write it there.")


def cached(path: Path, tokenizer: Any, cache: Path) -> Tokens:
    """`tokenize`, kept in folder `cache` and memory-mapped from there the next time.

    Of several processes the first one does it.
    """
    record = cache / (path.name.split(".")[0] + ".json")
    names = {field: record.with_suffix(f".{field}.npy") for field in ("ids", "starts")}
    if is_first() and not record.exists():
        tokens = tokenize(path, tokenizer)
        cache.mkdir(parents=True, exist_ok=True)
        for field, name in names.items():
            np.save(name, getattr(tokens, field))
        aside = record.with_suffix(".tmp")
        aside.write_text(json.dumps({"boundary": tokens.boundary, "size": tokens.size}))
        aside.replace(record)
    meet(str(record))
    arrays = {field: np.load(name, mmap_mode="r") for field, name in names.items()}
    return Tokens(**arrays, **json.loads(record.read_text()))


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Training batches of windows over several domains: a pure function of (seed, step).

    Each window starts with the boundary token and the start of a sentence. Within a domain,
    windows go by epochs: nominal places `seq_len` apart, shifted and shuffled anew in each epoch,
    each moved to the next start of a sentence, so that all text is seen about equally often.

    Attributes:
      tokens: of each domain.
      domains: the shares, in the same order.
      steps: length of the run, over which the shares move.
      batch_size: windows in a batch.
      seq_len: predicted tokens in a window, which holds one token more.
      seed: of every choice.
    """

    tokens: Sequence[Tokens]
    domains: Sequence[Domain]
    _: dataclasses.KW_ONLY
    steps: int
    batch_size: int
    seq_len: int
    seed: int

    @functools.cached_property
    def plan(self) -> tuple[Int[np.ndarray, "steps B"], Int[np.ndarray, "steps B"]]:
        """The domain of every window, and how many windows of that domain came before it."""
        first = np.array([domain.weight for domain in self.domains])
        last = np.array([domain.last_weight for domain in self.domains])
        time = np.linspace(0, 1, self.steps)[:, None]
        shares = (1 - time) * first / first.sum() + time * last / last.sum()
        draws = np.random.default_rng([self.seed, 0]).random((self.steps, self.batch_size, 1))
        domain = (draws >= np.cumsum(shares, axis=1)[:, None, :-1]).sum(-1)
        before = np.zeros_like(domain)
        for index in range(len(self.domains)):
            of_this = domain == index
            before[of_this] = np.arange(of_this.sum())
        return domain, before

    def batch(self, step: int) -> dict[str, Int[np.ndarray, "B T1"]]:
        """`input_ids` int32 [batch_size, seq_len + 1] of one step, 0 <= step < steps."""
        domain, before = self.plan
        rows = [self._row(int(d), int(n)) for d, n in zip(domain[step], before[step], strict=True)]
        return {"input_ids": np.stack(rows)}

    def _row(self, domain: int, number: int) -> Int[np.ndarray, "T1"]:
        tokens = self.tokens[domain]
        count = max(len(tokens.ids) // self.seq_len, 1)
        epoch, place = divmod(number, count)
        shift, order = _epoch(self.seed, domain, epoch, count, self.seq_len)
        nominal = (order[place] * self.seq_len + shift) % len(tokens.ids)
        nearest = np.searchsorted(tokens.starts, nominal) % len(tokens.starts)
        return tokens.window(int(tokens.starts[nearest]), self.seq_len + 1)


@functools.lru_cache(maxsize=64)
def _epoch(
    seed: int, domain: int, epoch: int, count: int, width: int
) -> tuple[int, Int[np.ndarray, "count"]]:
    rng = np.random.default_rng([seed, 1, domain, epoch])
    return int(rng.integers(width)), rng.permutation(count)


def all_windows(tokens: Tokens, seq_len: int) -> dict[str, np.ndarray]:
    """Every token but the boundaries once as a target, in windows that do not overlap.

    Returns:
      `input_ids` int32 [W, seq_len + 1], and `weights` float32 [W, seq_len]: 1 where the target
      counts.
    """
    count = -(-len(tokens.ids) // seq_len)
    input_ids = np.stack([tokens.window(i * seq_len, seq_len + 1) for i in range(count)])
    weights = input_ids[:, 1:] != tokens.boundary
    weights[-1, len(tokens.ids) - (count - 1) * seq_len :] = False
    return {"input_ids": input_ids, "weights": weights.astype(np.float32)}
