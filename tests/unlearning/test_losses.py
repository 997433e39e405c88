"""Losses of unlearning: values of the peers' own code, limits, gradients, and mistakes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import unlearning
from jaxlm.core.errors import UserError
from jaxlm.unlearning import FORGET, RETAIN, TokenScores, forget_loss, losses, retain_loss
from tests.helpers.sentences import refused

# Logits without a random generator, and rows of which some tokens are in the loss.
B, T, V = np.meshgrid(np.arange(2), np.arange(5), np.arange(6), indexing="ij")
Z = 1.5 * np.sin(1 + 3 * B + 2 * T + 5 * V)
Z_REF = 1.2 * np.cos(2 + B + 3 * T + V)
IDS = np.array([[0, 3, 1, 4, 2], [5, 0, 2, 3, 1]])
LABELS = IDS.copy()
LABELS[[0, 0, 1, 1], [0, 1, 0, 4]] = -100


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def scores(z, **changes):
    """The scores of the targets, each at the place before it; the last place predicts nothing."""
    targets = np.pad(IDS[:, 1:], ((0, 0), (0, 1)))
    mask = np.pad((LABELS[:, 1:] != -100).astype(np.float64), ((0, 0), (0, 1)))
    log_probs = np.take_along_axis(log_softmax(z), targets[..., None], axis=-1)[..., 0]
    return TokenScores(log_probs, mask, targets, z)._replace(**changes)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


POLICY, REFERENCE = scores(Z), scores(Z_REF)
everywhere = np.pad(np.ones((2, 4)), ((0, 0), (0, 1)))


def test_the_scores_of_the_vectors():
    np.testing.assert_allclose(POLICY.sums, [-6.92197564, -9.69472671], rtol=1e-8)
    np.testing.assert_allclose(REFERENCE.sums, [-3.16329983, -6.76131252], rtol=1e-8)
    assert POLICY.counts.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("ga", {}, -2.76945039),
        ("npo", {"beta": 0.1}, 10.79964235),
        ("npo", {"beta": 1}, 0.07489439),
        ("npo", {"beta": 0.1, "variant": "released"}, 13.90846694),
        ("simnpo", {"beta": 4.5}, 6.99e-06),
        ("simnpo", {"beta": 2.5, "delta": 0.5}, 0.00477191),
        ("wga", {}, -0.17842422),
        ("satimp", {}, -0.00142547),
        ("undial", {}, 2.44655499),
        ("ceu", {}, 1.32380788),
        ("pdu", {}, 2.07854201),
        ("pdu", {"variant": "released"}, 1.95185871),
    ],
)
def test_values_of_the_peers_code(name, options, value):
    found = forget_loss(name, POLICY, REFERENCE, **options)
    assert found.shape == (2,)
    np.testing.assert_allclose(found.mean(), value, rtol=2e-3 if value < 1e-4 else 1e-6, atol=6e-9)


@pytest.mark.parametrize(
    ("name", "mask", "options", "value"),
    [
        ("nll", None, {}, 2.76945039),
        ("kl", None, {}, 0.99597493),
        ("kl", np.ones((2, 5)), {}, 0.76924152),  # the peer's, over prompts and padding too
        ("kl", None, {"variant": "released"}, 26.44603053),
    ],
)
def test_values_of_the_peers_terms_of_retained_rows(name, mask, options, value):
    policy = POLICY if mask is None else POLICY._replace(mask=mask)
    np.testing.assert_allclose(
        retain_loss(name, policy, REFERENCE, **options).mean(), value, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("divergence", "value"),
    [("kl", 0.618731), ("tv", 0.233331), ("js", 0.382945), ("pearson", 0.760000)],
)
def test_flat(divergence, value):
    def loss(forget, refusal):
        one = TokenScores(jnp.log(jnp.full((1, 2), refusal)), np.array([[1, 1]]))
        padded = jnp.array([[jnp.log(forget), 5.0]])  # what stands at padding does not count
        policy = TokenScores(padded, np.array([[1, 0]]), alternative=one)
        return forget_loss("flat", policy, divergence=divergence)[0]

    np.testing.assert_allclose(loss(0.8, 0.2), value, atol=1e-6)
    rises, falls = jax.grad(loss, argnums=(0, 1))(0.8, 0.2)
    assert rises > 0 > falls


def test_refusals_by_hand():
    alternative = TokenScores(np.array([[-4.0, -1.0]]), np.ones((1, 2)))
    policy = TokenScores(np.array([[-2.0]]), np.ones((1, 1)), alternative=alternative)
    other = TokenScores(np.array([[-6.0]]), np.ones((1, 1)))
    reference = TokenScores(np.array([[-1.5]]), np.ones((1, 1)), alternative=other)
    # s_f = -0.5, s_r = 1.
    expected = -2 / 0.3 * np.log(1 / (1 + np.exp(-0.3 * (1 - -0.5))))
    found = forget_loss("dpo_idk", policy, reference, beta=0.3)
    np.testing.assert_allclose(found, [expected])


def test_rmu_by_hand():
    rng = np.random.default_rng(0)
    h, frozen = rng.normal(size=(2, 2, 3, 4))
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    policy, reference = TokenScores(mask=mask, states=h), TokenScores(mask=mask, states=frozen)
    u = unlearning.control_vector(4, seed=3)
    assert (u > 0).all()
    np.testing.assert_allclose(jnp.sum(u**2), 1)
    for found, target in (
        (forget_loss("rmu", policy, coefficient=2.0, seed=3), np.asarray(2 * u)),
        (retain_loss("hidden", policy, reference), frozen),
    ):
        squares = ((h - target) ** 2).mean(axis=-1)
        np.testing.assert_allclose(found, [squares[0, :2].mean(), squares[1, 0]], rtol=1e-6)


def test_npo_becomes_ascent_on_the_sum():
    for beta, error in ((1e-3, 1e-2), (1e-5, 1e-4)):
        found = forget_loss("npo", POLICY, REFERENCE, beta=beta) - 2 / beta * np.log(2)
        np.testing.assert_allclose(found, POLICY.sums - REFERENCE.sums, atol=error)


def test_weighted_ascent_becomes_ascent():
    for name, options in (("wga", {"beta": 0}), ("satimp", {"beta1": 0, "beta2": 0})):
        np.testing.assert_array_equal(
            forget_loss(name, POLICY, **options), forget_loss("ga", POLICY)
        )


def test_ceu_aims_at_the_other_tokens_alone():
    """At the target q has 0 and else the policy's shares: the gradient in z is p - q."""
    gradient = jax.grad(lambda z: forget_loss("ceu", POLICY._replace(logits=z)).mean())(Z)
    p = np.exp(log_softmax(Z))
    scored = (POLICY.mask > 0) & (np.cumsum(POLICY.mask, axis=1) > 1)
    for b, t in zip(*np.nonzero(scored), strict=True):
        q = p[b, t].copy()
        q[POLICY.targets[b, t]] = 0
        q /= q.sum()
        np.testing.assert_allclose(gradient[b, t], (p[b, t] - q) / scored.sum(), atol=1e-12)
    assert not gradient[~scored].any()


def test_the_weight_of_npo_vanishes_where_a_row_is_forgotten():
    def slope(name, log_prob):
        def loss(x):
            return forget_loss(name, TokenScores(x[None, None], np.ones((1, 1))), zero)[0]

        return jax.grad(loss)(jnp.asarray(log_prob))

    zero = TokenScores(np.zeros((1, 1)), np.ones((1, 1)))
    assert slope("npo", 0.0) == 1
    assert slope("npo", -200.0) < 1e-8
    assert slope("simnpo", -200.0) < 1e-8
    assert slope("ga", -200.0) == 1


@pytest.mark.parametrize("name", FORGET)
def test_padding_and_parts_of_a_batch_change_nothing(name):
    """The mean over rows is that of the parts, and what stands at padding does not count."""
    rng = np.random.default_rng(1)
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])

    def made(seed, junk=0.0):
        rng = np.random.default_rng(seed)
        z, states = rng.normal(size=(4, 4, 6)), rng.normal(size=(4, 4, 5))
        targets = np.random.default_rng(2).integers(6, size=(4, 4))
        log_probs = np.take_along_axis(log_softmax(z), targets[..., None], -1)[..., 0]
        log_probs = np.where(mask, log_probs, junk)
        z = np.where(mask[..., None], z, junk)
        per_target = np.full(4, 4 / mask.sum())
        return TokenScores(log_probs, mask, targets, z, states, per_target=per_target)

    def whole(junk=0.0, rows=slice(None)):
        both = [made(seed, junk)._replace(alternative=made(seed + 9, junk)) for seed in (5, 6)]
        part = functools.partial(jax.tree.map, lambda x: x[rows])
        return forget_loss(name, *map(part, both))

    expected = whole()
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(whole(junk=3.0), expected, rtol=1e-12)
    if name != "ceu":  # its first targets are left out, so its mean is over others
        parts = [whole(rows=slice(i, i + 2)) for i in (0, 2)]
        np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-12)
    del rng


def test_the_dual_step():
    assert losses.dual_step(0.5, 0.25, eta=2.0, eps=0.5) == 0
    assert losses.dual_step(0.5, 1.0, eta=2.0, eps=0.5) == 1.5


def test_task_vectors_change_the_model_and_keep_its_dtype():
    start, tuned = {"w": jnp.ones(3, jnp.bfloat16)}, {"w": jnp.full(3, 1.5, jnp.bfloat16)}
    found = unlearning.task_vector(start, start, tuned, 2.0)["w"]
    assert found.dtype == jnp.bfloat16
    assert found.tolist() == [0, 0, 0]


def test_whos_harry_potter_lowers_what_the_reinforced_model_raises():
    found = unlearning.whp_logits(jnp.array([1.0, 2.0]), jnp.array([3.0, 1.0]), 0.5)
    assert found.tolist() == [0, 2]


def test_options_are_those_of_the_functions():
    assert FORGET["npo"]().options == {"beta": 0.1, "variant": "paper"}
    assert FORGET["rmu"](layer=3).layer_of_states == 3
    assert {term().section for term in RETAIN.values()} == {"retain"}
    mixed = forget_loss([("ga", 0.5), {"name": "wga", "weight": 2}], POLICY)
    np.testing.assert_allclose(mixed, 0.5 * losses.ga(POLICY) + 2 * losses.wga(POLICY), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "key", "part"),
    [
        (lambda: forget_loss("np0", POLICY), "loss", "Did you mean npo"),
        (lambda: forget_loss("npo", POLICY), "reference", "needed"),
        (lambda: forget_loss("ga", POLICY, beta=0.1), "beta", "no such option"),
        (lambda: forget_loss("npo", POLICY, REFERENCE, beta=0), "loss.beta", "above 0"),
        (lambda: forget_loss("rmu", POLICY), "states", "needed"),
        (lambda: forget_loss("rmu", POLICY, layer=1.5), "loss.layer", "whole number"),
        (lambda: forget_loss("flat", POLICY), "alternative", "needed"),
        (lambda: forget_loss("flat", POLICY, divergence="hellinger"), "loss.divergence", "pearson"),
        (lambda: retain_loss("kl", POLICY), "reference", "needed"),
        (lambda: retain_loss("nl", POLICY), "retain", "nll"),
    ],
)
def test_mistakes(make, key, part):
    with refused(key, part):
        make()


def test_mistakes_are_user_errors():
    with pytest.raises(UserError):
        forget_loss("ceu", TokenScores(np.zeros((1, 1)), np.ones((1, 1))))
