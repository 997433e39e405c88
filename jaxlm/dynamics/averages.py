"""The average number of parameters of a model that is pruned, or grows, as it trains."""

from typing import Any

import numpy as np

from jaxlm.core.errors import UserError


def average_params(tokens: Any, params: Any) -> float:
    r"""Average number of parameters over training, $\bar N = \frac1D \int_0^D N(t)\, dt$.

    Args:
        tokens: [K], knots, rising; in tokens or in shares of them.
        params: [K], N at the knots, linear between them. A jump is two knots at one place.

    Raises:
        UserError: the knots do not rise.

    References:
        Jin et al. 2025, arXiv:2501.12486, where the average takes the place of N in Chinchilla's
        law.

    >>> average_params([0.0, 0.25, 0.75, 1.0], [4e8, 4e8, 2e8, 2e8])
    300000000.0
    """
    lengths, sizes = _pieces("tokens", tokens, params)
    return float((lengths * sizes).sum() / lengths.sum())


def average_params_by_compute(compute: Any, params: Any) -> float:
    r"""`average_params` for knots in compute, of which a token costs in proportion to N.

    A piece that takes compute c at an average size n holds $c / n$ tokens, so that $\bar N = \sum c
    / \sum (c / n)$. N is linear in tokens within a piece.

    Args:
        compute: [K], knots, rising; in any unit or in shares of it.
        params: [K], N at the knots.

    Raises:
        UserError: the knots do not rise.

    >>> average_params_by_compute([0.0, 0.5, 0.5, 1.0], [3e8, 3e8, 1e8, 1e8])
    150000000.0
    """
    spent, sizes = _pieces("compute", compute, params)
    return float(spent.sum() / (spent / sizes).sum())


def _pieces(name: str, knots: Any, params: Any) -> tuple[np.ndarray, np.ndarray]:
    """Length and mean size of each piece."""
    places, sizes = np.asarray(knots, np.float64), np.asarray(params, np.float64)
    rises = places.ndim == 1 and places.shape == sizes.shape and (np.diff(places) >= 0).all()
    if not rises or places[0] == places[-1] or not (sizes > 0).all():
        raise UserError(
            f"{name} and params must be knots of equal number, the first rising and the second "
            "above 0; give for example [0, 1] and [1e9, 1e9]"
        )
    return np.diff(places), (sizes[1:] + sizes[:-1]) / 2
