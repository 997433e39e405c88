"""Does a key-value bottleneck forget a class of text, and what do simpler methods do?

The classes are domains of a corpus, cut into pieces of some words. The features of a piece are the
mean of a frozen encoder's hidden states. Each class is forgotten in turn, by a bottleneck and by a
linear head on the same features. A model retrained without the class is the standard; a model
whose logit of the class is removed is the trivial way to the same accuracy.

Accuracy alone does not tell whether a class is forgotten. So a linear probe is trained on the
logits of all training pieces, and training goes on with all classes: does the probe find the class,
and how soon is it learned again? The linear head is itself a probe of what the encoder knows.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float

from jaxlm.artifacts.files import file_path
from jaxlm.core.checks import distinct, number, whole
from jaxlm.core.dtypes import wide
from jaxlm.core.errors import UserError
from jaxlm.data.corpus import documents, find
from jaxlm.data.rows import pad, round_up, tokenizer_of
from jaxlm.models import LanguageModel
from jaxlm.studies.figures import new_axes, save_figure
from jaxlm.studies.grid import Result, Say, check_seeds_and_output
from jaxlm.studies.tables import aligned, percent, shown, spread
from jaxlm.train.load import load_model
from jaxlm.train.state import Program
from jaxlm.typing import Batch, Params
from jaxlm.unlearning import bottleneck

BATCH = 256
"""Pieces in a step of training; a quarter of it in a forward pass of the encoder."""
FORGOTTEN = 0.01
"""Largest accuracy on a class that counts as forgotten."""
LOST = 0.02
"""Largest loss of accuracy on the other classes that counts as kept."""
RELEARNED = 0.9
"""Share of its earlier accuracy at which a class counts as learned again."""


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig:
    """The configuration of the study.

    Attributes:
        model: the encoder, a folder or hub id; null means the shipped model.
        corpus: folder of `<domain>.jsonl[.gz]` files with a field `text`.
        domains: the classes, names of these files.
        words: number of words in a piece.
        train: number of training pieces of each class, which the seed draws from a first part of
            its file.
        test: number of test pieces of each class, from the rest of its file.
        books: number of codebooks.
        pairs: number of pairs of a key and a value in each codebook.
        size: numbers in a key.
        steps: training steps of the bottleneck, the linear head and probes; most steps of others.
        learning_rate: of SGD for the values; gradients are small, see
            `jaxlm.unlearning.bottleneck.train`.
        head_learning_rate: of Adam for the linear head, and for gradient ascent on it.
        activations: increasing numbers of pairs to disable.
        examples: numbers of examples whose pairs are disabled.
        seeds: of the pieces, of keys and of training.
        output: folder of the study.
    """

    model: str | None = None
    corpus: str
    domains: tuple[str, ...]
    words: int = 55
    train: int = 200
    test: int = 100
    books: int = 64
    pairs: int = 64
    size: int = 8
    steps: int = 300
    learning_rate: float = 100.0
    head_learning_rate: float = 0.003
    activations: tuple[int, ...] = (200, 400, 600, 800, 1200, 1600)
    examples: tuple[int, ...] = (1, 5, 20, 100)
    seeds: tuple[int, ...] = (0, 1, 2)
    output: str

    study: ClassVar[str] = "bottleneck"

    def __post_init__(self):
        check_seeds_and_output(self)
        for key in ("domains", "activations", "examples"):
            distinct(key, getattr(self, key))
        if len(self.domains) < 2:
            raise UserError(f"domains: must be at least two (got {self.domains[0]}). Add one.")
        whole(self, "words", "train", "test", "books", "pairs", "size", "steps")
        number(self, "learning_rate", "head_learning_rate", above=0)


class Data(NamedTuple):
    """Features [N, D] and classes [N] of both splits."""

    train: Any
    train_labels: Any
    test: Any
    test_labels: Any


class Model(NamedTuple):
    """A classifier, and what it takes to make it of a trained one.

    Attributes:
        apply, params, inputs: its logits are `apply(params, inputs(features))`.
        optimizer: of `params`.
        encoded: pieces that the encoder reads.
        products: multiply-adds on their features.
        removed: whether the class is not among the answers.
    """

    apply: Callable[[Any, Any], Any]
    params: Any
    inputs: Callable[[Any], Any]
    optimizer: Any
    encoded: int = 0
    products: int = 0
    removed: bool = False

    def scores(self, features: Any) -> Any:
        """Return the logits of the classes."""
        return self.apply(self.params, self.inputs(features))


def outline(config: BottleneckConfig, where: str, plan_flags: Any) -> str:
    """Return a line for each class."""
    seeds = ", ".join(map(str, config.seeds))
    return "\n".join(f"seeds {seeds}, forget {domain}" for domain in config.domains)


def run(
    config: BottleneckConfig,
    folder: Path,
    where: str,
    *,
    mesh: Mesh | None = None,
    say: Say = print,
) -> Result:
    """Forget each class in turn; see `jaxlm.studies.study`."""
    corpus = file_path(config.corpus, "corpus")
    texts = {name: cut(find(corpus, name), config.words) for name in config.domains}
    lm = load_model(config.model, mesh=mesh)
    seeds = []
    for seed in config.seeds:
        data = draw(config, texts, seed, lambda pieces: encode(lm, pieces))
        seeds.append(measured(config, data, seed, say))
    table = {
        method: {name: [[row[name] for row in seed[method]] for seed in seeds] for name in rows[0]}
        for method, rows in seeds[0].items()
    }
    figure = draw_activations(config, table, folder / "activations.png")
    return Result({"domains": config.domains, "methods": table}, markdown(table), (figure,))


def cut(path: Path, words: int) -> list[str]:
    """Return the text of a domain in pieces of equally many words, across documents."""
    text = [word for lines in documents(path) for line in lines for word in line.split()]
    return [" ".join(text[i : i + words]) for i in range(0, len(text) - words + 1, words)]


def draw(
    config: BottleneckConfig,
    texts: dict[str, list[str]],
    seed: int,
    encode: Callable[[Sequence[str]], Float[np.ndarray, "N D"]],
) -> Data:
    """Return the features of the pieces of a seed, standardized by those of the training pieces."""
    splits: tuple[list[str], list[str]] = ([], [])
    for label, (name, pieces) in enumerate(texts.items()):
        # Training and test pieces do not alternate, so at most one document is in both.
        place = len(pieces) * config.train // (config.train + config.test)
        parts = pieces[:place], pieces[place:]
        generator = np.random.default_rng([seed, label])
        for split, part, count in zip(splits, parts, (config.train, config.test), strict=True):
            if len(part) < count:
                raise UserError(
                    f"domains: {name} has {len(pieces)} pieces (got train: {config.train} and "
                    f"test: {config.test}). Lower these, or words."
                )
            split += [part[i] for i in generator.permutation(len(part))[:count]]
    train, test = (encode(split) for split in splits)
    mean, std = train.mean(axis=0), train.std(axis=0) + 1e-6
    classes = np.arange(len(texts))
    return Data(
        jnp.asarray((train - mean) / std), jnp.asarray(np.repeat(classes, config.train)),
        jnp.asarray((test - mean) / std), jnp.asarray(np.repeat(classes, config.test)),
    )  # fmt: skip


def encode(lm: LanguageModel, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
    """Return the mean of the hidden states over the tokens of each text."""
    limit = lm.config.max_positions
    ids = tokenizer_of(lm)(list(texts), truncation=True, max_length=limit)["input_ids"]
    length, size = min(round_up(max(map(len, ids))), limit), BATCH // 4

    def mean(params: Params, batch: Batch) -> Any:
        hidden = wide(lm.hidden(params, batch["input_ids"], batch["attention_mask"]))
        weights = jnp.asarray(batch["attention_mask"], hidden.dtype)[..., None]
        return (hidden * weights).sum(axis=1) / weights.sum(axis=1)

    program, parts = Program(mean), []
    for start in range(0, len(ids), size):
        chunk = ids[start : start + size]
        rows, mask = pad([*chunk, *[[0]] * (size - len(chunk))], (length,))
        batch = {"input_ids": rows, "attention_mask": mask}
        parts.append(np.asarray(program(lm.params, batch))[: len(chunk)])
    return np.concatenate(parts)


# Optimizers are cached, since each new one would be compiled anew.
_sgd, _adam = functools.cache(optax.sgd), functools.cache(optax.adam)


def linear(params: Any, features: Any) -> Any:
    """Return the logits of a linear head."""
    return features @ params["kernel"] + params["bias"][None]


def fit_head(config: BottleneckConfig, features: Any, labels: Any, key: Any) -> Model:
    """Train a linear head on features."""
    shape = features.shape[1], len(config.domains)
    params = {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1])}
    optimizer = _adam(config.head_learning_rate)
    fitted = bottleneck.fit(
        linear, params, features, labels, optimizer, steps=config.steps, key=key
    )
    return Model(linear, fitted.params, lambda features: features, optimizer)


def fit_bottleneck(config: BottleneckConfig, features: Any, labels: Any, key: Any) -> Any:
    """Fit the keys and train the values."""
    sizes = {"books": config.books, "pairs": config.pairs, "size": config.size}
    init_key, key = jax.random.split(key)
    state = bottleneck.init(init_key, features, **sizes)
    optimizer, options = _sgd(config.learning_rate), {"steps": config.steps, "key": key}
    classes = len(config.domains)
    return bottleneck.train(state, features, labels, optimizer, classes=classes, **options)[0]


def methods(
    config: BottleneckConfig, data: Data, label: int, state: Any, head: Model, key: Any
) -> dict[str, Model]:
    """Return what each method makes of the trained bottleneck and of the linear head."""
    own = data.train_labels == label
    forget, others = data.train[own], data.train[~own]
    width, classes = data.train.shape[1], len(config.domains)
    numbers = config.books * config.size  # of all keys that a piece selects
    lookup = numbers * (width + config.pairs)

    def of(state: Any, encoded: int = 0, products: int = 0, **options: Any) -> Model:
        inputs = functools.partial(bottleneck.lookup, state, disabled=state.disabled)
        optimizer = _sgd(config.learning_rate)
        return Model(bottleneck.read, state.values, inputs, optimizer, encoded, products, **options)

    models = {"bottleneck": of(state)}
    for count in config.examples:
        left = bottleneck.forget_by_examples(state, forget, count, key)
        models[f"by examples: {count}"] = of(left, count, count * lookup)
    tried: list[Model] = []
    for count in config.activations:
        left = bottleneck.forget_by_activations(state, forget, count)
        tried.append(of(left, config.train, config.train * lookup))
        models[f"by activations: {count}"] = tried[-1]
    learned = [float((each.scores(forget).argmax(axis=1) == label).mean()) for each in tried]
    fewest = next((i for i, x in enumerate(learned) if x <= FORGOTTEN), len(tried) - 1)
    products = (2 + fewest) * config.train * lookup  # hits, and predictions for each number
    models["by activations: fewest"] = tried[fewest]._replace(products=products)
    without = state._replace(values=state.values.at[..., label].set(0))
    models["bottleneck, logit removed"] = of(without, removed=True)
    retrained = fit_bottleneck(config, others, data.train_labels[~own], key)
    clusters = numbers * (width + bottleneck.PASSES * config.pairs)
    reads = 2 * config.steps * BATCH * config.books * classes  # forward and backward
    products = len(others) * (lookup + clusters) + reads
    models["bottleneck, retrained"] = of(retrained, len(others), products)
    models["bottleneck, untrained values"] = of(state._replace(values=0 * state.values))

    models["linear head"] = head
    zeros = jax.tree.map(lambda x: x.at[..., label].set(0), head.params)
    models["linear head, row removed"] = head._replace(params=zeros, removed=True)
    ascend = functools.partial(
        bottleneck.fit, linear, head.params, forget, data.train_labels[own],
        _adam(-config.head_learning_rate), key=key,
    )  # fmt: skip
    curve = ascend(steps=config.steps, watched=(forget, label)).accuracy
    taken = steps_until(curve <= FORGOTTEN)
    products = 2 * taken * BATCH * width * classes
    params = ascend(steps=taken).params
    ascended = head._replace(params=params, encoded=config.train, products=products)
    models["linear head, gradient ascent"] = ascended
    zeros = jax.tree.map(jnp.zeros_like, head.params)
    models["linear head, untrained"] = head._replace(params=zeros)
    return models


def steps_until(reached: Any) -> int:
    """Return the steps until the first that reached the goal, or all of them."""
    return int(np.argmax(reached)) + 1 if np.any(reached) else len(reached)


def measured(
    config: BottleneckConfig, data: Data, seed: int, say: Say
) -> dict[str, list[dict[str, float]]]:
    """Return the numbers of every method, for each class that is forgotten."""
    key, *keys = jax.random.split(jax.random.key(seed), 1 + len(config.domains))
    state = fit_bottleneck(config, data.train, data.train_labels, key)
    head = fit_head(config, data.train, data.train_labels, key)
    table: dict[str, list[dict[str, float]]] = {}
    for label, (domain, key) in enumerate(zip(config.domains, keys, strict=True)):
        say(f"seed {seed}, forget {domain}")
        own = np.asarray(data.test_labels == label)
        for name, model in methods(config, data, label, state, head, key).items():
            scores = model.scores(data.test)
            answers = scores.at[:, label].set(-jnp.inf) if model.removed else scores
            right = np.asarray(answers.argmax(axis=1) == data.test_labels)
            row = {"forgotten": float(right[own].mean()), "others": float(right[~own].mean())}
            table.setdefault(name, []).append(row)
            before = table["linear head" if name.startswith("linear") else "bottleneck"][label]
            row["change"] = row["others"] - before["others"]
            row["both"] = float(row["forgotten"] <= FORGOTTEN and row["change"] >= -LOST)
            row["probe"] = probed(config, data, label, model, key)
            again = bottleneck.fit(
                model.apply, model.params, model.inputs(data.train), data.train_labels,
                model.optimizer, steps=config.steps, key=key,
                watched=(model.inputs(data.test[own]), label),
            ).accuracy  # fmt: skip
            goal = RELEARNED * before["forgotten"]
            row["relearned"] = 0 if row["forgotten"] >= goal else steps_until(again >= goal)
            row |= {"encoded": model.encoded, "products": model.products}
    return table


def probed(config: BottleneckConfig, data: Data, label: int, model: Model, key: Any) -> float:
    """Return the share of the class's test pieces that a linear probe of the logits finds."""
    seen = model.scores(data.train)
    mean, std = seen.mean(axis=0, keepdims=True), seen.std(axis=0, keepdims=True) + 1e-6
    probe = fit_head(config, (seen - mean) / std, data.train_labels, key)
    scores = probe.scores((model.scores(data.test) - mean) / std)
    return float((scores[data.test_labels == label].argmax(axis=1) == label).mean())


def markdown(table: dict[str, dict[str, list[list[float]]]]) -> str:
    """Return a row for each method: means over classes, and over seeds with their deviation."""
    header = (
        "method", "forgotten class %", "other classes %", "change", "both hold %",
        "probe of the logits %", "steps to relearn", "pieces encoded", "multiply-adds (millions)",
    )  # fmt: skip
    rows = []
    for method, numbers in table.items():
        means = {name: spread(np.mean(seeds, axis=1).tolist()) for name, seeds in numbers.items()}
        shares = (percent(means[n]) for n in ("forgotten", "others", "change", "both", "probe"))
        costs = means["encoded"]["mean"], means["products"]["mean"] / 1e6
        steps = shown(means["relearned"], digits=0)
        rows.append((method, *shares, steps, f"{costs[0]:.0f}", f"{costs[1]:.4g}"))
    return f"{aligned(header, rows)}\n"


def draw_activations(config: BottleneckConfig, table: Any, path: Path) -> Path:
    """Draw the accuracies against the number of disabled pairs; dots are seeds."""
    axes = new_axes((5.2, 3.4))
    names = ("bottleneck", *(f"by activations: {n}" for n in config.activations))
    kinds = {"forgotten": "forgotten class", "others": "other classes"}
    for i, (name, label) in enumerate(kinds.items()):
        seeds = np.array([np.mean(table[method][name], axis=1) for method in names])
        axes.plot((0, *config.activations), seeds.mean(axis=1), color=f"C{i}", label=label)
        axes.plot((0, *config.activations), seeds, ".", color=f"C{i}")
        best = np.mean(table["bottleneck, retrained"][name])
        axes.axhline(best, color=f"C{i}", linestyle=":", label=f"{label}, retrained without it")
    axes.set(xlabel="disabled pairs", ylabel="test accuracy", ylim=(-0.03, 1.03))
    axes.legend(frameon=False, fontsize="small")
    return save_figure(axes, path)


Config = BottleneckConfig
