"""Similarities of responses against plain loops, and the theorem of which they are the reason."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.preference import (
    PairScores,
    ches,
    displacement,
    last_hidden_inner_product,
    losses,
    negative_edit_distance,
)
from tests.helpers import reference
from tests.helpers.sentences import refused

PROMPT = 3
LENGTHS = ((4, 2), (1, 5), (3, 3))


def states(rng, lengths, side, total=11, dim=5):
    """Random states, and a mask of the tokens of the response, of rows padded on one side."""
    h = rng.normal(size=(len(lengths), total, dim)).astype(np.float32)
    completion = np.zeros((len(lengths), total), int)
    starts = []
    for row, n in enumerate(lengths):
        start = total - n if side == "left" else PROMPT
        completion[row, start : start + n] = 1
        starts.append(start)
    return h, completion, starts


def by_hand(h, starts, lengths, final):
    """The states of each response, token by token: k is predicted by the state at k - 1."""
    rows = []
    for row, (start, n) in enumerate(zip(starts, lengths, strict=True)):
        rows.append([h[row, k - 1] for k in range(start, start + n)])
        rows[-1] += [h[row, start + n - 1]] if final else []
    return rows


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("final", [False, True], ids=["paper", "script"])
def test_plain_loops(side, final):
    rng = np.random.default_rng(0)
    arguments, rows = [], []
    for lengths in zip(*LENGTHS, strict=True):
        h, completion, starts = states(rng, lengths, side)
        predicting = np.pad(completion[:, 1:], ((0, 0), (0, 1)))
        arguments += [jnp.asarray(h), predicting]
        rows.append(by_hand(h.astype(np.float64), starts, lengths, final))
    found = ches(*arguments, include_final=final)
    normalized = ches(*arguments, include_final=final, length_normalize=True)
    last = last_hidden_inner_product(*arguments, include_final=final)
    for i, (chosen, rejected) in enumerate(zip(*rows, strict=True)):
        s_w, s_l = np.sum(chosen, axis=0), np.sum(rejected, axis=0)
        n_w, n_l = len(chosen), len(rejected)
        np.testing.assert_allclose(found[i], s_w @ s_l - s_w @ s_w, rtol=1e-5, atol=1e-6)
        expected = s_w @ s_l / (n_w * n_l) - s_w @ s_w / n_w**2
        np.testing.assert_allclose(normalized[i], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(last[i], chosen[-1] @ rejected[-1], rtol=1e-5, atol=1e-6)
    if not final:  # the states of all tokens but the last, as the masks of a batch give them
        shorter = [x[:, :-1] for x in arguments]
        np.testing.assert_allclose(ches(*shorter), found, rtol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("case", ["llama", "gpt_neox", "gemma2"])
def test_states_of_transformers(case, tmp_path):
    """Row by row without padding there, a padded batch here; the responses differ in length."""
    import torch

    theirs = reference.make_model(case)
    theirs.save_pretrained(tmp_path)
    lm = jaxlm.from_pretrained(tmp_path)
    rng = np.random.default_rng(4)
    sides, total = ([], []), 14
    for prompt, *lengths in ((5, 4, 2), (2, 1, 7), (6, 3, 3), (3, 8, 5)):
        start = rng.integers(4, 37, prompt).tolist()
        for side, n in zip(sides, lengths, strict=True):
            side.append((start + rng.integers(4, 37, n).tolist(), prompt))

    @torch.no_grad()
    def predicting(ids, prompt):
        states = theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        return states.double().numpy()[prompt - 1 : -1]

    rows = [[predicting(*row) for row in side] for side in sides]
    w, l = ([states.sum(0) for states in side] for side in rows)
    expected = [a @ b - a @ a for a, b in zip(w, l, strict=True)]
    w, l = ([states.mean(0) for states in side] for side in rows)
    normalized = [a @ b - a @ a for a, b in zip(w, l, strict=True)]
    last = [a[-1] @ b[-1] for a, b in zip(*rows, strict=True)]
    for padding in ("right", "left"):
        arguments = []
        for side in sides:
            masks = np.zeros((3, len(side), total), np.int32)  # ids, attention, completion
            for i, (ids, prompt) in enumerate(side):
                first = 0 if padding == "right" else total - len(ids)
                masks[0, i, first : first + len(ids)] = ids
                masks[1, i, first : first + len(ids)] = 1
                masks[2, i, first + prompt : first + len(ids)] = 1
            h = jax.jit(lm.hidden)(lm.params, *masks[:2])
            arguments += [h[:, :-1], masks[2, :, 1:]]
        for found, wanted in (
            (ches(*arguments), expected),
            (ches(*arguments, length_normalize=True), normalized),
            (last_hidden_inner_product(*arguments), last),
        ):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_identities():
    rng = np.random.default_rng(1)
    h = jnp.asarray(rng.normal(size=(2, 7, 4)), jnp.float32)
    ones = np.ones((2, 7), int)
    np.testing.assert_array_equal(ches(h, ones, h, ones), 0)
    half = ches(h, ones, 0.5 * h, ones)
    assert (half < 0).all()
    # Responses that differ in the last token: the states that predict them are the same.
    other = h.at[:, -1].set(9.0)
    predicting = ones * (np.arange(7) < 6)
    np.testing.assert_array_equal(ches(h, predicting, other, predicting), 0)
    assert (ches(h, predicting, other, predicting, include_final=True) != 0).all()


def test_sums_of_bfloat16_are_float32():
    """Width 2,048, 200 tokens: the norm of the sum is 1e6, the difference of alike sums small."""
    rng = np.random.default_rng(2)
    h = jnp.asarray(1 + rng.normal(size=(2, 200, 2048)), jnp.bfloat16)
    other = h.at[:, :5].multiply(-1)
    mask = np.ones((2, 200), int)
    exact = [np.asarray(x, np.float64).sum(1) for x in (h, other)]
    expected = (exact[0] * (exact[1] - exact[0])).sum(1)
    found = ches(h, mask, other, mask)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    expected = (np.asarray(h[:, -1], np.float64) * np.asarray(other[:, -1], np.float64)).sum(1)
    np.testing.assert_allclose(last_hidden_inner_product(h, mask, other, mask), expected, rtol=1e-5)


def slow_distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    swap = slow_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(swap, slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1)


def test_edit_distance():
    rng = np.random.default_rng(3)
    pairs = [[rng.integers(0, 3, rng.integers(1, 6)).tolist() for _ in "ab"] for _ in range(40)]
    expected = [-slow_distance(a, b) / max(len(a), len(b)) for a, b in pairs]
    np.testing.assert_allclose(negative_edit_distance(*zip(*pairs, strict=True)), expected)
    with refused("rejected", "is empty"):
        negative_edit_distance([[1]], [[]])


# One response token, logits W h: tokens are chosen, rejected, and a third.
W = np.array([[4.0, 0.0], [4.0, -1.0], [-20.0, 22.0]])
H = np.array([1.0, 1.0])


def log_probs(params):
    return jax.nn.log_softmax(params["W"] @ params["h"])


def dpo_of(params, reference):
    chosen, rejected, _ = log_probs(params)
    scores = PairScores(*(x[None] for x in (chosen, rejected, *reference)))
    return losses.dpo(scores, beta=0.1)[0]


def test_the_theorem_of_three_tokens():
    """The paper's theorem: a third token takes the mass of the chosen one, while DPO succeeds."""
    with jax.enable_x64(True):
        params = {"W": jnp.asarray(W), "h": jnp.asarray(H)}
        reference = log_probs(params)[:2]
        probs = np.exp(log_probs(params))
        np.testing.assert_allclose(probs, [0.66524096, 0.24472847, 0.09003057], atol=1e-8)

        grads = jax.grad(dpo_of)(params, reference)
        _, speeds = jax.jvp(log_probs, (params,), (jax.tree.map(jnp.negative, grads),))
        np.testing.assert_allclose(speeds, [-0.0288484554, -0.27884846, 0.97115154], rtol=1e-6)
        chosen, rejected, third = W
        p, q, r = probs
        mass = (1 - p) * chosen @ chosen + q * rejected @ rejected + (1 - p + q) * H @ H
        slope = mass - (1 - p + q) * chosen @ rejected - r * third @ (chosen - rejected)
        np.testing.assert_allclose(speeds[0], 0.05 * slope, rtol=1e-9)  # 0.05 is beta / 2

        @jax.jit
        def train(params):
            def step(_, params):
                grads = jax.grad(dpo_of)(params, reference)
                return jax.tree.map(lambda x, g: x - 0.01 * g, params, grads)

            return jax.lax.fori_loop(0, 400, step, params)

        trained = train(params)
        np.testing.assert_allclose(
            np.exp(log_probs(trained)), [0.14137895, 0.01603304, 0.84258801], atol=1e-8
        )
        np.testing.assert_allclose(dpo_of(trained, reference), 0.63603761, atol=1e-8)

        before, after = (
            PairScores(*(x[None] for x in (*log_probs(at)[:2], *reference)))
            for at in (params, trained)
        )
        found = displacement(before, after)
        assert found.fraction == 1
        np.testing.assert_allclose(found.loss, 0.63603761 - np.log(2), atol=1e-8)
        np.testing.assert_allclose(found.chosen, np.log(0.14137895 / 0.66524096), atol=1e-7)
        np.testing.assert_allclose(found.rejected, np.log(0.01603304 / 0.24472847), atol=1e-6)
