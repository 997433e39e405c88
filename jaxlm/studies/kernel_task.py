"""A task as kernels and their solvers need it: a function, labels, and the stored kernels.

With a prompt, the function returns the pretrained head's logits of the label words. Without one the
model reads the bare text, and a linear head is fitted first, since the kernel of a random head says
nothing about the model (Malladi et al. 2022, arXiv:2210.05643).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxlm.artifacts.files import report_write_errors
from jaxlm.artifacts.processes import to_host
from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.data import TaskConfig, Template, load_task, prepare_for
from jaxlm.evaluation import calibration_offsets
from jaxlm.kernels import ntk, saved_ntk
from jaxlm.kernels.kinds import Kind
from jaxlm.kernels.solve import classes
from jaxlm.models import add_classifier
from jaxlm.sharding import place_params, placed_like
from jaxlm.studies.probe import fit_rows, input_of, linear_probe, with_rows
from jaxlm.train.load import load_model, with_head
from jaxlm.train.state import Program
from jaxlm.typing import Params

Split = Literal["train", "validation", "test"]
Function = Callable[..., Float[Array, "N C"]]


class Group(NamedTuple):
    """Examples of a split that are padded to one length.

    Attributes:
        places: positions of the examples in the split.
        x: the input of the function, arrays with the examples on axis 0.
    """

    places: Int[np.ndarray, " N"]
    x: dict[str, Any]


@dataclass(frozen=True, eq=False)
class KernelTask:
    """A model and a few-shot task.

    Attributes:
        config: the task, with the template that was used.
        lm: the model, with the parameters at which kernels are computed.
        encoded: a `jaxlm.data.EncodedTask`.
        f: `f(params, x, *, tap=None) -> [N, C]`, see `label_logits` and `label_difference`.
        prompt: whether the text stands in the task's template.
        offsets: subtracted from the label words' logits, [C]; None for none.
        description: the template and the label words, which define f.
    """

    config: TaskConfig
    lm: Any
    encoded: Any
    f: Function
    prompt: bool
    offsets: Float[np.ndarray, " C"] | None = None
    description: str = ""

    def labels(self, split: Split) -> Int[np.ndarray, " N"]:
        """Return the classes of a split."""
        return np.array([each.label for each in getattr(self.encoded, split)], np.int32)

    def whole(self, split: Split) -> dict[str, Any]:
        """Return a split in one group, padded to its longest example."""
        return self._inputs(np.arange(len(getattr(self.encoded, split))), split)

    def groups(self, split: Split) -> list[Group]:
        """Return a split in groups of similar length, to waste little on padding."""
        examples = getattr(self.encoded, split)
        lengths = np.array([max(map(len, each.input_ids)) for each in examples])
        bucket = np.searchsorted(self.encoded.buckets, lengths)
        parts = [np.flatnonzero(bucket == each) for each in np.unique(bucket)]
        return [Group(places, self._inputs(places, split)) for places in parts]

    def _inputs(self, places: np.ndarray, split: Split) -> dict[str, Any]:
        examples = getattr(self.encoded, split)
        batch = self.encoded.collate([examples[i] for i in places])
        return {name: batch[name] for name in batch if name not in ("labels", "weights")}

    def values(self, function: Callable[..., Any], split: Split, *params: Any) -> np.ndarray:
        """Return `function(*params, x)` of a split, for a compiled function that returns [N, C]."""
        parts = [(places, np.asarray(function(*params, x))) for places, x in self.groups(split)]
        return joined(parts, 0)

    def accuracy(self, scores: Float[np.ndarray, "N C"], split: Split) -> float:
        """Return the share of a split whose class is right."""
        return float(np.mean(classes(scores) == self.labels(split)))


def joined(parts: list[tuple[np.ndarray, np.ndarray]], axis: int) -> np.ndarray:
    """Join arrays of groups on an axis, in the order of the places of their examples."""
    places = np.concatenate([places for places, _ in parts])
    whole = np.concatenate([array for _, array in parts], axis=axis)
    return np.take(whole, np.argsort(places), axis=axis)


def label_logits(
    lm: Any, token_ids: Int[Any, " C"], offsets: Float[Any, " C"] | None = None
) -> Function:
    """Return `f(params, x, *, tap=None) -> [N, C]`, the logits of label words or of a classifier.

    `offsets` are subtracted from the logits, which does not change the kernel.
    """
    words = np.asarray(token_ids)

    def f(params: Any, x: dict[str, Any], *, tap: Any = None) -> Array:
        logits = lm.apply(
            params,
            x["input_ids"],
            x["attention_mask"],
            token_type_ids=x.get("token_type_ids"),
            positions=x["positions"],
            token_ids=words,
            tap=tap,
        )
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return logits if offsets is None else logits - jnp.asarray(offsets, logits.dtype)[None]

    return f


def label_difference(
    lm: Any, token_ids: Int[Any, " 2"], offsets: Float[Any, " 2"] | None = None
) -> Function:
    """Return `label_logits` as one number: the second label word's minus the first's, [N, 1]."""
    logits = label_logits(lm, token_ids, offsets)

    def f(params: Any, x: dict[str, Any], *, tap: Any = None) -> Array:
        both = logits(params, x, tap=tap)
        return both[:, 1:] - both[:, :1]

    return f


def kernel_task(
    model: Any,
    task: TaskConfig,
    *,
    seed: int,
    prompt: bool = True,
    calibrate: bool = False,
    base_dir: Path | None = None,
    mesh: Mesh | None = None,
) -> KernelTask:
    """Load a model and a task; f is the logit difference of two label words, or logits of more.

    Without a prompt, the fitted head of a decoder is the rows of the label words in an untied
    output embedding, read at the last token; that of an encoder is a classifier on the pooled
    first token. An encoder without a masked-token head gets such a classifier with a prompt too.

    Args:
        model: a `LanguageModel`, a folder, a hub id, or None for the shipped model.
        task: a few-shot task: with `k`, and `validation="hold_out"`.
        seed: of the examples drawn.
        prompt: whether to put the text into the task's template.
        calibrate: whether to subtract `jaxlm.evaluation.calibration_offsets` of the training and
            validation texts, without their labels, from scores; ignored where a head is fitted.
        base_dir: folder in which relative paths of the task are looked up first.
        mesh: of the parameters; by default they stay where they are.
    """
    lm = load_model(model, mesh=mesh) if model is None or isinstance(model, str | Path) else model
    config = task if prompt else dataclasses.replace(task, template=bare_template(task.template))
    loaded = load_task(config, seed=seed, base_dir=base_dir)
    for split in ("train", "validation", "test"):
        if not getattr(loaded, split):
            raise UserError(
                f"task.{split}: the task has no such examples (got none). Name a file of them."
            )
    fitted = not prompt or lm.config.head not in ("lm", "mlm")
    if fitted and lm.config.kind == "encoder":
        if lm.config.head == "mlm":
            lm = add_classifier(lm, len(config.labels), jax.random.key(seed))
        lm = with_head(lm, len(config.labels), seed=seed)
    elif lm.config.head == "classifier":
        raise UserError("model: a decoder needs a head of tokens (got a classifier). Give another.")
    encoded = prepare_for(lm, loaded)
    if encoded.token_ids is None:
        raise UserError("task.labels: must be words of one token each. Choose others.")
    if fitted and lm.config.kind == "encoder":
        # The classifier is fitted from scratch, with its classes in the order of the task.
        order = np.arange(len(encoded.labels), dtype=np.int32)
        encoded = dataclasses.replace(encoded, token_ids=order)
    elif fitted:
        lm = with_rows(lm, encoded.token_ids, linear_probe(lm, encoded))
    subject = KernelTask(config, lm, encoded, label_logits(lm, encoded.token_ids), prompt)
    if fitted and lm.config.kind == "encoder":
        lm = _fit_classifier(subject)
    if mesh is not None:
        lm = lm.replace(params=place_params(lm.params, mesh))
    offsets = None
    if calibrate and not fitted:
        f = Program(subject.f)
        texts = [subject.values(f, split, lm.params) for split in ("train", "validation")]
        offsets = calibration_offsets(np.concatenate(texts))
    function = label_difference if len(encoded.labels) == 2 else label_logits
    return dataclasses.replace(
        subject,
        lm=lm,
        f=function(lm, encoded.token_ids, offsets),
        offsets=offsets,
        description=f"{config.template} | {', '.join(encoded.labels)} | {function.__name__}",
    )


def bare_template(template: str) -> str:
    """Return the fields of a template alone, followed by the place of the label.

    >>> bare_template("{text} this is {label}"), bare_template("*cls**sent_0*_It_was*mask*.*sep+*")
    ('{text} {label}', '*cls**sent_0**mask**sep+*')
    """
    names = Template.parse(template).field_names
    if all(name.startswith("*") for name in names):
        first, *rest = (name.strip("*") for name in names)
        return f"*cls**{first}*" + "".join(f"*+{name}*" for name in rest) + "*mask**sep+*"
    return " ".join(f"{{{name}}}" for name in names) + " {label}"


def _fit_classifier(task: KernelTask) -> Any:
    """Return an encoder with the logistic regression of `fit_rows` as its classifier."""
    lm, names = task.lm, task.encoded.labels

    def read(params: Params, x: dict[str, Any]) -> Array:
        x = {name: x[name] for name in x if name != "positions"}
        return input_of(lm.apply, lambda path, op: path == "classifier.kernel", params, x)

    features = task.values(Program(read), "train", lm.params)
    rows, constant = fit_rows(features, task.labels("train"), names=names, intercept=True)
    old = lm.params["classifier"]
    fitted = {"kernel": rows.T, "bias": constant}
    new = {name: placed_like(fitted[name], old[name]) for name in old}
    return lm.replace(params={**lm.params, "classifier": new})


def draw_name(prompt: bool, k: int | None, seed: int) -> str:
    """Return the name of a prompt and of the examples that a seed draws.

    >>> draw_name(True, 16, 0)
    'prompt-k16-seed0'
    """
    return f"{'prompt' if prompt else 'no-prompt'}-k{k}-seed{seed}"


class Kernels:
    """Kernels at the pretrained parameters of a task's model.

    Attributes:
        task: model and examples.
        folder: where they are stored, each with a manifest; None keeps them in memory.
        kinds: name to a `kind` of `jaxlm.kernels.ntk`, for kinds with settings of their own.
        select: of `jaxlm.kernels.ntk`.
    """

    def __init__(
        self,
        task: KernelTask,
        folder: Path | None = None,
        *,
        kinds: Mapping[str, Kind] | None = None,
        select: paths.Select = None,
    ):
        self.task, self.folder, self.kinds = task, folder, kinds or {}
        self.select = select
        self._known: dict[tuple[str, ...], np.ndarray] = {}

    def of(self, kind: str, split: Split) -> np.ndarray:
        """Return the kernel of a split with the training examples, [M, C, N, C]."""
        params = self.task.lm.params
        return self._once((kind, split), lambda: self._compute(params, kind, split, self.folder))

    def flipped(self, kind: str, split: Split) -> np.ndarray:
        """Return the kernel of the training examples with a split, [N, C, M, C]."""

        def compute() -> np.ndarray:
            train, params = self.task.whole("train"), self.task.lm.params
            parts = []
            for i, (places, x) in enumerate(self.task.groups(split)):
                place = self.folder and self.folder / f"{kind}-{split}-{i}-flipped"
                parts.append((places, self._ntk(params, kind, train, x, place)))
            return joined(parts, 2)

        return self._once((kind, split, "flipped"), compute)

    def f0(self, split: Split) -> np.ndarray:
        """Return the function at a split, [M, C]."""
        task = self.task
        return self._once(
            ("f0", split), lambda: task.values(Program(task.f), split, task.lm.params)
        )

    def at(self, params: Any, kind: str, split: Split) -> np.ndarray:
        """Return the kernel at other parameters, as `of`, without keeping it."""
        return self._compute(params, kind, split, None)

    def _compute(self, params: Any, kind: str, split: Split, folder: Path | None) -> np.ndarray:
        train = self.task.whole("train")
        if split == "train":
            return self._ntk(params, kind, train, None, folder and folder / f"{kind}-{split}")
        parts = []
        for i, (places, x) in enumerate(self.task.groups(split)):
            place = folder and folder / f"{kind}-{split}-{i}"
            parts.append((places, self._ntk(params, kind, x, train, place)))
        return joined(parts, 0)

    def _ntk(self, params: Any, kind: str, x1: Any, x2: Any, place: Path | None) -> np.ndarray:
        settings: dict[str, Any] = {"kind": self.kinds.get(kind, kind), "select": self.select}
        if place is None:
            return to_host(ntk(self.task.f, params, x1, x2, **settings))
        settings["template"] = self.task.description
        with report_write_errors(place):
            return to_host(saved_ntk(place, self.task.f, params, x1, x2, **settings))

    def _once(self, key: tuple[str, ...], compute: Callable[[], np.ndarray]) -> np.ndarray:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]
