"""One battery of losses: golden values, gradients at extreme scores, invariances, padding."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import preference
from jaxlm.preference import LOSSES, PairScores, losses
from tests.helpers.sentences import refused

SCORES = PairScores(
    chosen=np.array([-12.0, -20, -7.5, -31]),
    rejected=np.array([-15.0, -14, -9, -30]),
    ref_chosen=np.array([-11.0, -22, -8, -28]),
    ref_rejected=np.array([-13.0, -15.5, -11, -30.5]),
    chosen_tokens=np.array([6, 10, 5, 16]),
    rejected_tokens=np.array([5, 7, 6, 12]),
    z=np.array(0.5),
    samples=np.array([[1.0, -2], [0.5, 0], [3, 1], [-1, 4]]),
)
S_W, S_L = SCORES.chosen - SCORES.ref_chosen, SCORES.rejected - SCORES.ref_rejected
NLL = 70.5 / 37  # of the chosen tokens of the batch


def logistic(x):
    return np.log1p(np.exp(-x))


D2O = logistic(0.1 * SCORES.samples.mean(1) - 0.2 * S_L).mean()


class Row(NamedTuple):
    """A loss, its options, and the mean over `SCORES` to six digits.

    `same` says what changes nothing: "ratio", a constant added to the response's log-probability
    under policy and reference; "pair", one added to both responses under the policy; or "".
    """

    name: str
    value: float
    options: dict[str, Any] = {}  # noqa: RUF012
    same: str = "ratio"


ROWS = [
    Row("dpo", 0.741799),
    Row("dpo", 0.697571, {"beta": 0.01}),
    Row("dpo", 0.993392, {"f_divergence": "forward_kl"}),
    Row("dpo", 0.720878, {"f_divergence": "js"}),
    Row("dpo", 0.785054, {"f_divergence": "alpha", "f_alpha": 0.5}),
    Row("cdpo", 0.733049),
    Row("robust", 0.752736),
    Row("hinge", 1.087500),
    Row("ipo", 25.649034),
    Row("ipo_sum", 37.687500),
    Row("exo_pair", 2.915573),
    Row("nca_pair", 1.416468),
    Row("bco_pair", 1.437761),
    Row("sppo_hard", 64.937500),
    Row("apo_zero", 1.021754),
    Row("apo_down", 1.012370),
    Row("discopop", 0.855584),
    Row("dpo_norm", 0.965070),
    Row("dpo_norm", 0.696241, {"beta": 0.1}),
    Row("dpo_gamma", 0.735830, {}, "pair"),
    Row("flex_dpo", 0.720906),
    Row("dpop", 5.424209),
    Row("dpop", 1.087117, {"penalty": 5.0}),
    Row("cream", 0.706799, {"consistency": 0.6}),
    Row("aot", 0.740090),
    Row("aot_unpaired", 0.738224),
    Row("kto", 0.510856),
    Row("d2o", D2O, {"alpha": 0.2}),
    Row("irpo", 2.601174, {}, ""),
    Row("rpo", 0.698453, {}, ""),
    Row("simpo", 0.644567, {}, ""),
    Row("simpo", 1.039905, {"beta": 2.5, "gamma": 1.375}, ""),
    Row("cpo", 0.739299, {"alpha": 0.0}, "pair"),
    Row("cpo", 2.644705, {}, ""),
    Row("orpo", 1.911904, {}, ""),
    Row("orpo", 1.957935, {"variant": "released"}, ""),
    Row("sft", NLL, {}, ""),
]
row = pytest.mark.parametrize(
    "row", ROWS, ids=["-".join(map(str, [x.name, *x.options.values()])) for x in ROWS]
)


def per_token_of_batch(row):
    mean = row.name == "sft" or row.options.get("variant") == "released"
    return mean or (row.name == "cpo" and row.options.get("alpha") != 0)


def term(row):
    return LOSSES[row.name](**row.options)


def test_every_loss_has_a_row():
    assert {x.name for x in ROWS} == set(LOSSES)
    assert all(kind().name == name for name, kind in LOSSES.items())


@row
def test_the_golden_value(row):
    with jax.enable_x64(True):
        values = term(row)(SCORES)
        assert values.dtype == jnp.float64
        assert values.shape == (4,)
        # The golden values have six digits.
        np.testing.assert_allclose(values.mean(), row.value, rtol=1e-6, atol=5e-7)
    np.testing.assert_allclose(term(row)(SCORES), values, rtol=1e-5)


def test_kto_at_zero():
    value = preference.loss(SCORES._replace(z=np.array(-3.0)), "kto").mean()
    np.testing.assert_allclose(value, 0.510877, rtol=2e-6)


@row
@pytest.mark.parametrize("size", [1e-9, 1e4])
def test_gradients_are_finite_at_extreme_scores(row, size):
    """Responses that are certain, or impossible, in any combination."""
    grid = np.stack(np.meshgrid(*[[-size, 0.0]] * 4)).reshape(4, -1).astype(np.float32)
    ones = np.ones(grid.shape[1], np.int32)
    scores = PairScores(*grid, ones, ones, SCORES.z, np.stack([grid[0], -grid[1]], axis=1))

    def mean(chosen, rejected):
        return term(row)(scores._replace(chosen=chosen, rejected=rejected)).mean()

    value, grads = jax.value_and_grad(mean, (0, 1))(*grid[:2])
    assert np.isfinite([value, *np.concatenate(grads)]).all()


@row
def test_a_constant_changes_nothing(row):
    with jax.enable_x64(True):
        moved = SCORES
        if row.same == "ratio":
            moved = SCORES._replace(chosen=SCORES.chosen - 3, ref_chosen=SCORES.ref_chosen - 3)
        elif row.same == "pair":
            moved = SCORES._replace(chosen=SCORES.chosen - 3, rejected=SCORES.rejected - 3)
        np.testing.assert_allclose(term(row)(moved), term(row)(SCORES), rtol=1e-12)


@row
def test_order_and_padding_change_nothing(row):
    """Each pair keeps its value, wherever it stands and whatever pads the batch."""
    order = np.array([2, 0, 3, 1])
    padding = PairScores(*np.full((4, 2), -99.0), *np.zeros((2, 2), int), None, np.ones((2, 2)))
    pairs = [
        np.concatenate([a[order], b]) for a, b in zip(SCORES, padding, strict=True) if b is not None
    ]
    padded = PairScores(*pairs[:6], SCORES.z, pairs[6])
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            term(row)(padded)[:4], term(row)(SCORES)[order], rtol=1e-12, atol=1e-12
        )


@row
def test_what_a_loss_needs(row):
    bare = SCORES._replace(ref_chosen=None, ref_rejected=None)
    if LOSSES[row.name].needs_reference:
        with refused("ref_rejected" if row.name == "d2o" else "ref_chosen", "is needed"):
            term(row)(bare)
    else:
        np.testing.assert_array_equal(term(row)(bare), term(row)(SCORES))


@row
def test_which_losses_depend_on_the_rest_of_the_batch(row):
    half = PairScores(*(x[:2] for x in SCORES[:6]), SCORES.z, SCORES.samples[:2])
    alone = np.allclose(term(row)(half), term(row)(SCORES)[:2])
    assert alone != (row.name in ("aot", "aot_unpaired") or per_token_of_batch(row))
    # The z of kto comes with the scores, but is of the whole batch.
    assert LOSSES[row.name].needs_whole_batch == (row.name in ("aot", "aot_unpaired", "kto"))


def test_values_of_pairs_and_of_other_implementations():
    """DPO pair by pair, and the value in a unit test of Tunix, with its inputs."""
    np.testing.assert_allclose(
        preference.loss(SCORES), [0.644397, 0.668460, 0.770957, 0.883382], rtol=2e-6
    )
    rng = np.random.RandomState(0)
    policy, reference = (rng.normal(0, 5, (8, 4)).sum(1) for _ in range(2))
    scores = PairScores(policy[:4], policy[4:], reference[:4], reference[4:])
    assert math.isclose(preference.loss(scores).mean(), 0.753059, rel_tol=2e-6)
    assert math.isclose(
        preference.loss(scores, "cdpo", label_smoothing=0.3).mean(), 0.925447, rel_tol=2e-6
    )


def at_start(scores):
    return scores._replace(chosen=scores.ref_chosen, rejected=scores.ref_rejected)


@pytest.mark.parametrize("beta", [0.01, 0.1, 3.0])
def test_dpo_starts_at_log_2(beta):
    values = preference.loss(at_start(SCORES), beta=beta)
    np.testing.assert_array_equal(values, np.float32(math.log(2)))


def test_dpo_gamma_ends_in_dpo_and_in_no_reference():
    gamma = {"name": "dpo_gamma", "gamma": 1.0}
    np.testing.assert_array_equal(preference.loss(SCORES, gamma), preference.loss(SCORES))
    compiled = [jax.jit(term) for term in (LOSSES["dpo_gamma"](gamma=1.0), LOSSES["dpo"]())]
    np.testing.assert_array_equal(compiled[0](SCORES), compiled[1](SCORES))
    cpo = preference.loss(SCORES, {"name": "cpo", "alpha": 0.0})
    np.testing.assert_allclose(preference.loss(SCORES, gamma | {"gamma": 0.0}), cpo, rtol=1e-6)


def test_losses_that_end_in_dpo():
    dpo = preference.loss(SCORES)
    one = SCORES._replace(samples=S_W[:, None])
    for scores, spec in [
        (one, "d2o"),
        (SCORES, {"name": "cream", "consistency": 1.0}),
        (SCORES, {"name": "dpop", "penalty": 0.0}),
        (SCORES, {"name": "cdpo", "label_smoothing": 0.0}),
        (SCORES, {"name": "robust", "label_smoothing": 0.0}),
        (SCORES, {"name": "flex_dpo", "beta_rejected": 0.1}),
        (SCORES, {"name": "rpo", "beta": 0.1, "eta": 0.0}),
        (SCORES, {"name": "dpo", "f_divergence": "alpha", "f_alpha": 1.0}),
        (SCORES, {"name": "irpo", "alpha": 0.0}),
    ]:
        np.testing.assert_allclose(preference.loss(scores, spec), dpo, rtol=2e-6)
    near = preference.loss(SCORES, {"name": "dpo", "f_divergence": "alpha", "f_alpha": 1.001})
    np.testing.assert_allclose(near, dpo, rtol=1e-3)


def test_consistency_may_differ_between_pairs():
    consistency = jnp.array([0.2, 0.6, 1.0, 0.5])
    values = losses.cream(SCORES, consistency=consistency)
    for i, each in enumerate(consistency):
        np.testing.assert_allclose(values[i], losses.cream(SCORES, consistency=each)[i], rtol=1e-6)


def tokens(rng):
    logits = rng.normal(size=(3, 6, 9))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    mask = np.array([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    return log_p[..., 0], np.log((np.exp(log_p) ** 2).sum(-1)), mask


def test_weights_of_wpo():
    log_probs, squares, mask = map(jnp.asarray, tokens(np.random.default_rng(0)))
    weights = preference.wpo_weight(log_probs, squares, mask)
    for i in range(3):
        at = np.flatnonzero(mask[i])
        expected = np.exp(np.mean([log_probs[i, t] - squares[i, t] for t in at]))
        np.testing.assert_allclose(weights[i], expected, rtol=1e-6)
    # A model that is sure of one token at each place has weight 1: DPO.
    certain = preference.wpo_weight(jnp.zeros((3, 6)), jnp.zeros((3, 6)), mask)
    np.testing.assert_array_equal(certain, 1)
    assert not jax.grad(lambda x: preference.wpo_weight(x, squares, mask).sum())(log_probs).any()


def test_log_probabilities_of_ld_dpo():
    log_probs, _, mask = map(jnp.asarray, tokens(np.random.default_rng(1)))
    shared = jnp.array([2, 2, 4])
    for alpha in (0.0, 0.3, 1.0):
        found = preference.ld_log_probs(log_probs, mask, shared, alpha)
        for i in range(3):
            at, n = np.flatnonzero(mask[i]), int(shared[i])
            expected = log_probs[i, at[:n]].sum() + alpha * log_probs[i, at[n:]].sum()
            np.testing.assert_allclose(found[i], expected, rtol=1e-6)


def test_a_mixture_is_a_weighted_sum():
    mpo = [("dpo", 0.8), ("bco_pair", 0.2), {"name": "sft"}]
    expected = 0.8 * 0.741799 + 0.2 * 1.437761 + NLL
    np.testing.assert_allclose(preference.loss(SCORES, mpo).mean(), expected, rtol=2e-6)
    both = [*mpo[:1], {"name": "hinge", "beta": 1.0}, LOSSES["hinge"](beta=1.0)]
    smaller = preference.loss(SCORES, both, beta=0.01)  # in place of their own
    expected = 0.8 * preference.loss(SCORES, beta=0.01)
    expected += 2 * preference.loss(SCORES, "hinge", beta=0.01)
    np.testing.assert_allclose(smaller, expected, rtol=1e-6)
    assert preference.terms(LOSSES["ipo"]()) == preference.terms(["ipo"])


def test_numbers_may_be_traced():
    betas = jnp.array([0.1, 1.0])
    found = jax.vmap(lambda beta: losses.dpo(SCORES, beta=beta))(betas)
    np.testing.assert_allclose(found[1], preference.loss(SCORES, beta=1), rtol=1e-6)


def test_narrow_scores_give_wide_losses():
    narrow = PairScores(*(jnp.asarray(x, jnp.bfloat16) for x in SCORES[:4]))
    assert preference.loss(narrow).dtype == jnp.float32


def test_the_dataclasses_are_those_of_the_functions():
    for name, kind in LOSSES.items():
        assert kind.function is getattr(losses, name)
        for field in dataclasses.fields(kind):
            assert f"{field.name}: " in "".join(base.__doc__ or "" for base in kind.__mro__)


def test_the_configuration_machinery_reads_them():
    from jaxlm.artifacts import config

    @dataclasses.dataclass(frozen=True)
    class Config:
        loss: Any = dataclasses.field(default=LOSSES["dpo"](), metadata={"registry": LOSSES})

    read = config.build(Config, {"loss": {"name": "simpo", "beta": "2.5"}}, "run.yaml").loss
    assert read == LOSSES["simpo"](beta=2.5)
    assert config.build(Config, {"loss": "kto"}, "run.yaml").loss == LOSSES["kto"]()
    with refused("loss.beta", "above 0"):
        config.build(Config, {"loss": {"name": "simpo", "beta": "0"}}, "run.yaml")


@pytest.mark.parametrize(
    ("spec", "shared", "key", "part"),
    [
        ("hing", {}, "loss", "Did you mean hinge?"),
        ("likelihood", {}, "loss", "Choose one of dpo, "),
        ({"name": "dpo", "bta": 0.1}, {}, "loss", "not an option of dpo (got 'bta')"),
        ([], {}, "loss", "must name a loss"),
        ({"name": ["dpo"]}, {}, "loss", "not known"),
        ("dpo", {"beta": 0.0}, "loss.beta", "above 0"),
        ("dpo", {"beta": math.inf}, "loss.beta", "above 0"),
        ({"name": "dpo", "beta": "0.1"}, {}, "loss.beta", "must be a number"),
        ("dpo", {"beta": 1e-60}, "loss.beta", "vanishes"),
        ({"name": "dpo", "f_divergence": "kl"}, {}, "loss.f_divergence", "not known"),
        ("dpo", {"label_smoothing": 0.1}, "label_smoothing", "choose one of cdpo, robust"),
        ("sft", {"beta": 0.1}, "beta", "sft has no such option"),
        ("robust", {"label_smoothing": 0.5}, "loss.label_smoothing", "below 0.5"),
        ("exo_pair", {"label_smoothing": 0.0}, "loss.label_smoothing", "at least 0.001"),
        ({"name": "orpo", "variant": "theirs"}, {}, "loss.variant", "paper, released"),
        ([("dpo", math.nan)], {}, "loss.weight", "finite"),
        ({"name": "dpop", "penalty": -1.0}, {}, "loss.penalty", "at least 0"),
    ],
)
def test_mistakes(spec, shared, key, part):
    with refused(key, part):
        preference.loss(SCORES, spec, **shared)


def test_scores_that_are_missing():
    with refused("z", "is needed"):
        preference.loss(SCORES._replace(z=None), "kto")
    with refused("samples"):
        preference.loss(SCORES._replace(samples=None), "d2o")
    with refused("chosen_tokens"):
        preference.loss(SCORES._replace(chosen_tokens=None), "simpo")
