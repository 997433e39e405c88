"""A random model of some thousand parameters with its own tokenizer, and a task that fits it."""

import json
from pathlib import Path

GOOD = ("bright", "fine", "lovely", "warm")
BAD = ("dull", "cold", "dreary", "stale")


def sentences(count: int) -> list[dict[str, str | int]]:
    """Short sentences of two classes that differ in one word."""
    words = (GOOD, BAD)
    return [
        {"text": f"the {words[i % 2][i // 2 % 4]} film number {i % 7}", "label": i % 2}
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "the", "film", "number", "it", "was", "good", "bad", *GOOD, *BAD]
    vocabulary = {word: i for i, word in enumerate([*words, *"0123456789"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", unk_token="<unk>"
    )


def make_masked():
    """The tokenizer of an encoder, with a mask token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", *make_tokenizer().get_vocab()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", unk_token="<pad>",
    )  # fmt: skip


def questions(count: int) -> list[dict]:
    """Rows as SQuAD has them; of two answers the one that stands in the context is right."""
    answers = [f"the {(GOOD[0], BAD[0])[i % 2]}" for i in range(count)]
    return [
        {
            "title": "film",
            "context": f"{answer} film number {i % 7}",
            "question": "it was ?",
            "answers": {"text": [answer], "answer_start": [0]},
        }
        for i, answer in enumerate(answers)
    ]


def make_reader():
    """A tokenizer of words and line breaks."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "\n", ":", "?", "Title", "Context", "Question", "Answer"]
    words += ["the", "film", "number", "it", "was", *GOOD, *BAD, *"0123456789"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[:?]"), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", unk_token="<unk>"
    )


def make_model(folder: Path, tokenizer=None, *, scale: float = 1.0) -> Path:
    """A random model; matrices are `scale` times as large as usual."""
    import jax

    from jaxlm.models import LanguageModel, ModelConfig, init_params, save_pretrained

    tokenizer = tokenizer or make_tokenizer()
    config = ModelConfig(
        family="llama",
        kind="decoder",
        head="lm",
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_size=8,
        intermediate_size=32,
        max_positions=32,
        embedding_size=16,
        activation="silu",
        gated_mlp=True,
        norm="rmsnorm",
        positions="rotary",
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
    )
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: scale * x if x.ndim > 1 and scale != 1 else x, params)
    save_pretrained(LanguageModel(config, params, tokenizer), folder)
    return folder


def write_run(folder: Path, model: Path) -> Path:
    """A configuration in `folder` whose task lies beside it."""
    for name, count in (("train", 40), ("validation", 16), ("test", 16)):
        write_jsonl(folder / f"{name}.jsonl", sentences(count))
    path = folder / "run.yaml"
    path.write_text(f"""\
model: {model}
task: {{name: tiny, train: train.jsonl, validation: validation.jsonl, test: test.jsonl,
       template: "{{text}} it was {{label}}", labels: [good, bad]}}
optimizer: {{name: mezo, learning_rate: 1.0e-2, eps: 1e-3}}
steps: 12
batch_size: 8
eval_every: 6
checkpoint_every: 4
log_every: 2
seed: 0
output: {folder / "run"}
""")
    return path


def write_corpus(folder: Path) -> None:
    """A tokenizer and a corpus of two domains, with held-out text."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<s>"})
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "corpus" / "held_out").mkdir(parents=True)
    for name, count in (("films", 60), ("more", 50), ("held_out/films", 20)):
        write_jsonl(folder / "corpus" / f"{name}.jsonl", sentences(count))
