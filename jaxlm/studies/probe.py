"""Linear probing: logistic regression on the head's input where it predicts the label word.

The model is not trained. The coefficients fit into the head as the rows of the label words, so a
probe is also a model.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxlm.core.errors import UserError
from jaxlm.core.precision import Packed
from jaxlm.data.rows import SplitName
from jaxlm.evaluation import accuracy, score_split
from jaxlm.train.state import Program
from jaxlm.typing import Batch, Params


class LinearProbe(NamedTuple):
    """A probe, which scores the label words by `features @ rows.T + intercept`.

    The intercept is zero where the head has no bias. Only splits with examples have an accuracy.
    """

    rows: Float[np.ndarray, "C D"]
    intercept: Float[np.ndarray, " C"]
    accuracy: dict[SplitName, float]
    peak_bytes: int


class _InputOf:
    """A tap that keeps the input `x` of one operation, which must be outside the layer scan."""

    layers = None

    def __init__(self, wanted: Callable[[str, str], bool]):
        self.wanted = wanted

    def __call__(self, path: str, op: str, x: Any, y: Any, layer: Any, *, rows: Any = None) -> Any:
        del layer, rows
        if self.wanted(path, op):
            self.x = x
        return y


def input_of(apply: Any, wanted: Callable[[str, str], bool], params: Params, batch: Batch) -> Any:
    """Return the input [B, D] of the head or the classifier, in float32."""
    tap = _InputOf(wanted)
    names = ("token_type_ids", "positions", "token_ids")
    where = {name: jnp.asarray(batch[name]) for name in names if name in batch}
    ids, mask = jnp.asarray(batch["input_ids"]), jnp.asarray(batch["attention_mask"])
    apply(params, ids, mask, tap=tap, **where)
    return tap.x.astype(jnp.float32)


def linear_probe(lm: Any, encoded: Any, *, batch_size: int = 64) -> LinearProbe:
    """Fit a probe on the training split, and measure its accuracy on every split.

    The strength of the l2 penalty is chosen by cross-validation within the training split, in five
    folds or as many as the rarest label allows. There is an intercept if the head has a bias, as
    in the code of Malladi et al. (arXiv:2305.17333): OPT has none, RoBERTa has one.
    """
    if lm.config.head not in ("lm", "mlm"):
        raise UserError(
            "model: has no language-modelling head, which a probe needs. Give another model."
        )
    if encoded.token_ids is None:
        raise UserError("task.labels: must be words of one token each. Choose others.")

    def read(params: Params, batch: Batch) -> Any:
        batch = {**batch, "token_ids": encoded.token_ids}
        return input_of(lm.apply, lambda path, op: op == "head", params, batch)

    program = Program(read)
    splits: tuple[SplitName, ...] = ("train", "validation", "test")
    seen = {}
    for split in splits:
        if examples := getattr(encoded, split):
            features, _ = score_split(program, lm.params, encoded, split, batch_size=batch_size)
            # A probe learns one class of each example, also where several are right.
            seen[split] = features, np.array([example.label for example in examples], np.int32)
    bias = "bias" in lm.params.get("lm_head", {})
    rows, intercept = fit_rows(*seen["train"], names=encoded.labels, intercept=bias)
    found = {
        split: accuracy(features @ rows.T + intercept[None], labels)
        for split, (features, labels) in seen.items()
    }
    return LinearProbe(rows, intercept, found, program.peak_bytes)


def fit_rows(
    features: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, " N"],
    *,
    names: tuple[str, ...],
    intercept: bool,
) -> tuple[Float[np.ndarray, "C D"], Float[np.ndarray, " C"]]:
    """Return rows and intercept of scikit-learn's cross-validated logistic regression.

    With two classes its one vector w becomes the rows -w/2 and w/2, whose difference is w.
    """
    from sklearn.linear_model import LogisticRegressionCV

    counts = np.bincount(labels, minlength=len(names))
    if counts.min() < 2:
        rare = names[int(counts.argmin())]
        raise UserError(
            f"task.train: a probe needs two examples of every label (got {counts.min()} of "
            f"{rare!r}). Give more, or raise task.k."
        )
    model = LogisticRegressionCV(
        cv=min(5, int(counts.min())),
        fit_intercept=intercept,
        max_iter=5000,
        scoring="accuracy",
        tol=1e-4,
    )
    with warnings.catch_warnings():
        # Some releases of scikit-learn warn about renamed arguments.
        warnings.simplefilter("ignore", FutureWarning)
        model.fit(features, labels)
    rows, constant = np.asarray(model.coef_), np.broadcast_to(model.intercept_, len(model.coef_))
    if len(names) == 2:
        rows, constant = (np.concatenate([-each, each]) / 2 for each in (rows, constant))
    return rows.astype(np.float32), constant.astype(np.float32)


def with_rows(lm: Any, token_ids: Int[Any, " C"], probe: LinearProbe) -> Any:
    """Return the model with the probe's rows as the head's rows of the label words.

    A head tied to the embedding table is untied, so that the embeddings do not change.
    """
    token_ids = np.asarray(token_ids)
    params, config = dict(lm.params), lm.config
    old = dict(params.get("lm_head", {}))
    table = params["embed"]["tokens"] if config.tie_embeddings else old
    embedding = table["embedding"]
    if isinstance(embedding, Packed):
        raise UserError("bits: a probe needs a head of floating-point numbers. Leave out.")
    new = {"embedding": embedding.at[token_ids].set(probe.rows.astype(embedding.dtype))}
    if "bias" in old:
        new["bias"] = old["bias"].at[token_ids].set(probe.intercept.astype(old["bias"].dtype))
    params["lm_head"] = new
    return lm.replace(params=params, config=dataclasses.replace(config, tie_embeddings=False))
