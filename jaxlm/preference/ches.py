r"""Similarity of the two responses of a pair, which predicts likelihood displacement.

Hidden states are those after the final norm, `lm.hidden`. A mask `predicting` is 1 at the states
that predict a scored token: the state at the last token of the prompt is in, the one after the last
scored token is not. With a `completion_mask` [B, T], the states `[:, :-1]` have the mask
`completion_mask[:, 1:]`, wherever the padding is.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Num

from jaxlm.core.dtypes import wide, wide_dtype
from jaxlm.core.errors import UserError


def ches(
    h_w: Float[Array, "B T D"],
    predicting_w: Num[ArrayLike, "B T"],
    h_l: Float[Array, "B U D"],
    predicting_l: Num[ArrayLike, "B U"],
    *,
    length_normalize: bool = False,
    include_final: bool = False,
) -> Float[Array, " B"]:
    r"""Return the centered hidden embedding similarity (CHES) of each pair.

    With $S = \sum_k h_k$ over the states that predict a response's tokens,

    $$\mathrm{CHES} = \langle S_w, S_l\rangle - \|S_w\|^2, \qquad
    \mathrm{lnCHES} = \frac{\langle S_w, S_l\rangle}{n_w n_l} - \frac{\|S_w\|^2}{n_w^2}.$$

    The higher it is, the more the probability of the chosen response is expected to fall. Pairs
    that differ in the last scored token alone have CHES 0, near the top of most data sets.

    Args:
        h_w: hidden states of prompt and chosen response, in any dtype.
        predicting_w: 1 where a state predicts a scored token.
        h_l, predicting_l: of the rejected response.
        length_normalize: return lnCHES.
        include_final: count the state after the last scored token too, as the authors' script does;
            then states and masks have all T tokens, the mask a last column of 0.

    Returns:
        [B], in at least float32, in which the sums are formed.

    References: Razin et al., arXiv:2410.08847.

    >>> h = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
    >>> ches(h, jnp.ones((1, 2)), h[:, :1], jnp.ones((1, 1))).tolist()
    [-1.0]
    """
    sums = []
    for h, predicting in ((h_w, predicting_w), (h_l, predicting_l)):
        mask = _mask(predicting, include_final)
        total = jnp.einsum(
            "btd,bt->bd",
            h,
            mask.astype(h.dtype),
            precision="highest",
            preferred_element_type=wide_dtype(h),
        )
        count = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
        sums.append(total / count if length_normalize else total)
    chosen, rejected = sums
    # The difference first: it is small where the responses are alike, and two products are not.
    return jnp.einsum("bd,bd->b", chosen, rejected - chosen, precision="highest")


def last_hidden_inner_product(
    h_w: Float[Array, "B T D"],
    predicting_w: Num[ArrayLike, "B T"],
    h_l: Float[Array, "B U D"],
    predicting_l: Num[ArrayLike, "B U"],
    *,
    include_final: bool = False,
) -> Float[Array, " B"]:
    """Return the inner product of the responses' last states, a baseline of `ches`, [B].

    The last state is the one that predicts the last scored token; see `ches` for the arguments.
    """
    states = []
    for h, predicting in ((h_w, predicting_w), (h_l, predicting_l)):
        mask = _mask(predicting, include_final)
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        states.append(wide(jnp.take_along_axis(h, last[:, None, None], axis=1)[:, 0]))
    return jnp.einsum("bd,bd->b", *states, precision="highest")


def negative_edit_distance(
    chosen: Sequence[Sequence[int]], rejected: Sequence[Sequence[int]]
) -> Float[np.ndarray, " B"]:
    """Return minus the edit distance of the responses' token ids over the longer length, [B].

    It is a baseline of `ches`: 0 for equal responses, -1 for responses without a common token.

    >>> negative_edit_distance([[1, 2, 3, 4]], [[1, 3, 4]])
    array([-0.25])
    """

    def distance(a: Sequence[int], b: Sequence[int]) -> float:
        if not len(a) or not len(b):
            name = "rejected" if len(a) else "chosen"
            raise UserError(f"{name}: a response is empty (got []). Leave the pair out.")
        steps, ids = np.arange(len(b) + 1), np.asarray(b)
        row = steps
        for i, token in enumerate(a):
            best = np.minimum(row[1:] + 1, row[:-1] + (ids != token))
            # An insertion costs 1 a step, so less the steps it is a running minimum.
            row = np.minimum.accumulate(np.append(i + 1, best) - steps) + steps
        return row[-1] / max(len(a), len(b))

    return -np.array([distance(*pair) for pair in zip(chosen, rejected, strict=True)], float)


def _mask(predicting: ArrayLike, include_final: bool) -> Bool[Array, "B T"]:
    mask = jnp.asarray(predicting) > 0
    return mask | jnp.pad(mask, ((0, 0), (1, 0)))[:, :-1] if include_final else mask
