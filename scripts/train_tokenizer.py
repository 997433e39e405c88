"""Train the byte-level BPE of the shipped language model on a prepared corpus.

    python scripts/train_tokenizer.py --corpus build/corpus --out build/tokenizer

Text is lower-cased, the first word gets a leading space like every other word, and every sequence
starts with ``<eos>`` (id 0), which also separates documents. Load the folder with
``transformers.AutoTokenizer.from_pretrained``.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

EOS = "<eos>"


def lines(corpus: Path) -> Iterator[str]:
    """Every line of every document, domains in the order of their names."""
    for path in sorted(corpus.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as records:
            for record in records:
                yield from json.loads(record)["text"].split("\n")


def train(corpus: Path, vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE of ``vocab_size`` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines(corpus), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", pair=f"{EOS} $A $B", special_tokens=[(EOS, 0)]
    )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    parser.add_argument("--out", type=Path, default=Path("build/tokenizer"))
    parser.add_argument("--vocab-size", type=int, default=6144)
    parser.add_argument("--max-length", type=int, default=512)
    args = parser.parse_args()
    tokenizer = train(args.corpus, args.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "model_max_length": args.max_length,
        "clean_up_tokenization_spaces": False,
    }
    (args.out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{tokenizer.get_vocab_size()} entries in {args.out}")


if __name__ == "__main__":
    main()
