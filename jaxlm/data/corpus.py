"""Running text for pretraining: tokenized once, memory-mapped, drawn by seed and step.

A corpus is a folder of `<domain>.jsonl` or `<domain>.jsonl.gz` files with one document per line, in
the field `text`; the lines of a document are its sentences. Shapes: B windows of a batch, T1 their
length, N tokens, S sentences or steps, D domains.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer

from jaxlm.artifacts.files import (
    inside,
    read_json,
    to_json,
    write_atomic,
)
from jaxlm.artifacts.folder import ensure_folder
from jaxlm.core import checks
from jaxlm.core.errors import UserError
from jaxlm.data import files
from jaxlm.models import hf_tokenizer

DOCUMENTS_AT_ONCE = 1000
CHARACTERS_AT_ONCE = 2**24


@dataclasses.dataclass(frozen=True)
class Domain:
    """The share of a domain among the windows; it moves linearly from `weight` to `final_weight`.

    Attributes:
      name: name of the file `<name>.jsonl` or `<name>.jsonl.gz`.
      weight: share at the first step; the weights of all domains are divided by their sum.
      final_weight: share at the last step; None keeps `weight`.
    """

    name: str
    weight: float
    final_weight: float | None = None

    def __post_init__(self) -> None:
        section = f"corpus.domains: {self.name}: "
        checks.number(self, "weight", "final_weight", least=0.0, section=section)

    @property
    def last_weight(self) -> float:
        """The share at the last step."""
        return self.weight if self.final_weight is None else self.final_weight


def check_domains(domains: Sequence[Domain], held_out: str | None = None) -> None:
    """Raise UserError if no domain has a share, or one is repeated or also held out."""
    names = [str(PurePosixPath(domain.name)) for domain in domains]
    checks.distinct("corpus.domains", names)
    for field, shares in (
        ("weight", [domain.weight for domain in domains]),
        ("final_weight", [domain.last_weight for domain in domains]),
    ):
        if not 0 < sum(shares) < math.inf:
            raise UserError(
                f"corpus.domains: {field} of all domains together is not a positive number (got "
                f"{checks.show(shares)}). Give at least one a share."
            )
    if held_out is not None and str(PurePosixPath(held_out)) in names:
        raise UserError(
            f"corpus.held_out: is trained on too (got {held_out!r}). Hold out another domain, or "
            "leave it out of corpus.domains."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one domain.

    Attributes:
      ids: token ids; a `boundary` stands before each document.
      starts: increasing indices into `ids` of the first token of each sentence.
      boundary: id of the token that starts a document.
      size: bytes of the text after the tokenizer's normaliser, which may lower-case it.
      digest: SHA-256 of the file and the tokenizer; empty for tokens that are not from a file.
    """

    ids: Integer[np.ndarray, "N"]
    starts: Int[np.ndarray, "S"]
    boundary: int
    size: int
    digest: str = ""

    def window(self, start: int, length: int) -> Int[np.ndarray, "length"]:
        """Return `boundary` and then `length - 1` tokens from `start`, wrapping at the end."""
        index = (start + np.arange(length - 1)) % len(self.ids)
        return np.concatenate([[self.boundary], self.ids[index]]).astype(np.int32)


def read_tokenizer(folder: Path) -> Any:
    """Read the transformers tokenizer of a folder, see `jaxlm.models.hf_tokenizer`."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"tokenizer: has no tokenizer.json (got {folder}). Train one.")
    return hf_tokenizer.read_tokenizer(folder)


def tokenize(path: Path, tokenizer: Any) -> Tokens:
    """Tokenize one file of documents; line ends inside a document become spaces.

    Args:
      path: a `.jsonl` or `.jsonl.gz` file.
      tokenizer: a transformers tokenizer with offsets, an eos_token and at most 65536 tokens.
    """
    boundary = tokenizer.eos_token_id
    if boundary is None:
        raise UserError("tokenizer: has no eos_token, which sets documents apart. Add one.")
    if len(tokenizer) > 2**16:  # tokens are stored as uint16
        raise UserError(f"tokenizer: has more than 65536 tokens (got {len(tokenizer)}). Train one.")
    normalizer = tokenizer.backend_tokenizer.normalizer
    ids: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    total = size = 0
    for lines in _batches(path):
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
        raise UserError(f'{path}: has no text. Write {{"text": "..."}} on each line.')
    return Tokens(np.concatenate(ids), np.unique(np.concatenate(starts)), boundary, size)


def _batches(path: Path) -> Iterator[list[list[str]]]:
    """Yield lists of documents to tokenize at once, small enough for the memory."""
    batch: list[list[str]] = []
    size = 0
    for document in documents(path):
        batch.append(document)
        size += sum(map(len, document))
        if len(batch) == DOCUMENTS_AT_ONCE or size >= CHARACTERS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def documents(path: Path) -> Iterator[list[str]]:
    """Yield the lines of each document, without empty ones."""
    for number, record in files.json_objects(files.lines(path, str(path)), str(path)):
        text = record.get("text")
        if not isinstance(text, str):
            raise UserError(f'{path}, line {number}: not a document. Write {{"text": "..."}}.')
        yield [line for line in text.split("\n") if line.strip()]


def find(folder: Path, name: str) -> Path:
    """Return the file of a domain, which must lie in the folder."""
    for suffix in (".jsonl", ".jsonl.gz"):
        if (path := inside(folder, name + suffix, "corpus.domains")).exists():
            return path
    raise UserError(
        f"corpus.domains: there is no {name}.jsonl or {name}.jsonl.gz (got {folder}). Write it."
    )


def source_digest(path: Path, tokenizer: Any) -> str:
    """Return SHA-256 of a file of text and of the tokenizer that reads it."""
    source = f"{files.digest(path, str(path))} {_digest(tokenizer)}"
    return hashlib.sha256(source.encode()).hexdigest()


def cached(path: Path, tokenizer: Any, cache: Path, digest: str | None = None) -> Tokens:
    """Tokenize a file once: store its tokens in the folder `cache` and memory-map them from there.

    The cache is keyed by the content of the file and the tokenizer (`source_digest`), not by their
    names. Damaged tokens fail their checksums and are made again. The main process tokenizes for
    all processes.
    """
    digest = source_digest(path, tokenizer) if digest is None else digest
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    folder = cache / f"{name}-{digest[:16]}"

    def write(tokens: Tokens, place: Path) -> None:
        np.save(place / "ids.npy", tokens.ids)
        np.save(place / "starts.npy", tokens.starts)
        record = {"boundary": tokens.boundary, "size": tokens.size}
        write_atomic(place / "tokens.json", to_json(record))

    ensure_folder(folder, lambda: tokenize(path, tokenizer), write)
    record = read_json(folder / "tokens.json", boundary=int, size=int)
    ids, starts = (np.load(folder / f"{field}.npy", mmap_mode="r") for field in ("ids", "starts"))
    return Tokens(ids, starts, record["boundary"], record["size"], digest)


def _digest(tokenizer: Any) -> str:
    """Return SHA-256 of everything that determines the tokens of a text."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"truncation": None, "padding": None}  # of an earlier call, not of `tokenize`
    text = json.dumps([state, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Training batches of windows over several domains: a pure function of (seed, step, shares).

    Each window starts with the boundary token and the start of a sentence. In each epoch of a
    domain, windows start at places `seq_len` apart, with a new shift and order; each place moves to
    the next start of a sentence, so that all text is seen about equally often.

    Attributes:
      tokens: tokens of each domain.
      domains: the domains with their shares over the run, in the same order.
      steps: length of the run, over which the shares change.
      batch_size: windows in a batch.
      seq_len: predicted tokens in a window, which holds one token more.
      seed: seed of every choice.
    """

    tokens: Sequence[Tokens]
    domains: Sequence[Domain]
    _: dataclasses.KW_ONLY
    steps: int
    batch_size: int
    seq_len: int
    seed: int

    def __post_init__(self) -> None:
        check_domains(self.domains)

    @functools.cached_property
    def plan(self) -> tuple[Int[np.ndarray, "steps B"], Int[np.ndarray, "steps B"]]:
        """The domain of every window, and the number of windows of that domain before it."""
        first = np.array([domain.weight for domain in self.domains])
        last = np.array([domain.last_weight for domain in self.domains])
        time = np.linspace(0, 1, self.steps)[:, None]
        shares = (1 - time) * first / first.sum() + time * last / last.sum()
        return self._plan(shares)

    def _plan(
        self, shares: Float[np.ndarray, "S D"]
    ) -> tuple[Int[np.ndarray, "S B"], Int[np.ndarray, "S B"]]:
        # The numbers of a step do not depend on how many steps are drawn, so a policy that appends
        # shares step by step draws the same windows as one plan of the whole run.
        draws = np.random.default_rng([self.seed, 0]).random((len(shares), self.batch_size, 1))
        domain = (draws >= np.cumsum(shares, axis=1)[:, None, :-1]).sum(-1)
        before = np.zeros_like(domain)
        for index in range(len(self.domains)):
            of_this = domain == index
            before[of_this] = np.arange(of_this.sum())
        return domain, before

    def batch(
        self, step: int, shares: Float[np.ndarray, "S D"] | None = None
    ) -> dict[str, Int[np.ndarray, "B T1"]]:
        """Draw the windows of one step.

        Args:
          step: the step, from 0.
          shares: shares of the domains at every step up to this one, S = step + 1, each row with
            the sum 1. A policy that chooses shares while it trains appends one row per step. None
            for the shares of `domains`, with step < `steps`.

        Returns:
          `input_ids` int32 [batch_size, seq_len + 1].

        Raises:
          UserError: shares have another shape, are negative, or do not sum to 1.
        """
        if shares is None:
            domain, before = self.plan
        else:
            shares = np.asarray(shares, np.float64)
            self._check(shares, step)
            domain, before = self._plan(shares)
        rows = [self._row(int(d), int(n)) for d, n in zip(domain[step], before[step], strict=True)]
        return {"input_ids": np.stack(rows)}

    def _check(self, shares: np.ndarray, step: int) -> None:
        wanted = (step + 1, len(self.domains))
        if shares.shape != wanted:
            raise UserError(
                f"shares: must have the shape [steps so far, domains], {wanted} (got "
                f"{shares.shape}). Append one row per step."
            )
        if not (np.all(shares >= 0) and np.allclose(shares.sum(axis=1), 1)):
            raise UserError(
                f"shares: must be 0 or more and sum to 1 (got {checks.show(shares[-1])}). Divide "
                "them by their sum."
            )

    def _row(self, domain: int, number: int) -> Int[np.ndarray, "T1"]:
        tokens = self.tokens[domain]
        count = max(len(tokens.ids) // self.seq_len, 1)
        # No place repeats within an epoch, and each epoch has a new shift, so that windows differ.
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
    """Cut tokens into windows in which every token except the boundaries is a target once.

    Returns:
      `input_ids` int32 [W, seq_len + 1], and `weights` float32 [W, seq_len]: 1 where the target
      counts.
    """
    count = -(-len(tokens.ids) // seq_len)
    input_ids = np.stack([tokens.window(i * seq_len, seq_len + 1) for i in range(count)])
    weights = input_ids[:, 1:] != tokens.boundary
    weights[-1, len(tokens.ids) - (count - 1) * seq_len :] = False
    return {"input_ids": input_ids, "weights": weights.astype(np.float32)}
