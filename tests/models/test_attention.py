"""Every implementation of attention against loops over queries in float64."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import attention
from jaxlm.models.attention import BLOCK, IMPLEMENTATIONS, Mask

B, H, G, K = 2, 4, 2, 3
PLAIN = ("xla", "blockwise")


def make(length: int, keys: int, dtype=np.float32):
    rng = np.random.default_rng(length)
    shapes = ((B, length, H, K), (B, keys, G, K), (B, keys, G, K))
    return [jnp.asarray(3 * rng.normal(size=shape), dtype) for shape in shapes]


def make_mask(length: int, keys: int, window: int | None, causal: bool):
    """Row 0 is whole; row 1 has its first two and its last key as padding."""
    real = np.ones((B, keys), np.int32)
    real[1, :2] = real[1, -1] = 0
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    first = keys - length
    return Mask(
        jnp.asarray(real), jnp.asarray(positions[:, first:]), jnp.asarray(positions), first, window,
        causal,
    )  # fmt: skip


def by_loops(q, k, v, mask: Mask, scale: float, cap: float | None, prefix: int = 0):
    """`prefix` more keys and values stand before those of the mask, and are seen by all."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    mask = SimpleNamespace(  # of NumPy, since it is indexed a thousand times
        **{k: np.asarray(x) if isinstance(x, jax.Array) else x for k, x in vars(mask).items()}
    )
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(*q.shape[:3]):
        row, group = mask.first + t, h // (H // G)
        distances = mask.query_positions[b, t] - mask.key_positions[b]
        distances = distances if mask.causal else np.abs(distances)
        seen = [True] * prefix + [
            s == row
            or (
                bool(mask.keys[b, s])
                and (not mask.causal or s <= row)
                and (mask.window is None or distances[s] < mask.window)
            )
            for s in range(k.shape[1] - prefix)
        ]
        scores = scale * k[b, seen, group] @ q[b, t, h]
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v[b, seen, group]
    return out


def check(inputs, cases, prefix=0):
    """Every implementation under each (mask, cap), all in one program."""
    masks, caps = zip(*cases, strict=True)

    @jax.jit
    def outputs(inputs, masks):
        return [
            [IMPLEMENTATIONS[name](*inputs, mask, scale=0.3, cap=cap) for name in PLAIN]
            for mask, cap in zip(masks, caps, strict=True)
        ]

    found = outputs(inputs, [mask.prefixed(prefix) if prefix else mask for mask in masks])
    for (mask, cap), by_name in zip(cases, found, strict=True):
        wanted = by_loops(*inputs, mask, 0.3, cap, prefix)
        for name, output in zip(PLAIN, by_name, strict=True):
            says = f"{name}, window {mask.window}, causal {mask.causal}, cap {cap}"
            np.testing.assert_allclose(output, wanted, atol=1e-5, err_msg=says)


@pytest.mark.parametrize(("length", "keys"), [(7, 7), (3, 9)])
def test_a_prefix_against_loops(length, keys, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 4)
    seen = [(1, True), (3, False), (None, True)]
    cases = [(make_mask(length, keys, *window_and_causal), None) for window_and_causal in seen]
    check(make(length, keys + 5), cases, prefix=5)


ALL = [(None, None), (3, None), (None, 0.7), (1, 2.0)]


@pytest.mark.parametrize(
    ("length", "keys", "options"), [(7, 7, ALL), (1, 7, [ALL[1]]), (3, 9, [(3, 0.7)])]
)
def test_against_loops(length, keys, options, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 4)
    cases = [
        (make_mask(length, keys, window, causal), cap)
        for causal in (True, False)
        for window, cap in options
    ]
    check(make(length, keys), cases)


def test_blocks_of_real_size_and_their_derivatives():
    length = 2 * BLOCK + 37
    inputs, mask = make(length, length), make_mask(length, length, None, True)
    tangents = [jnp.ones_like(x) for x in inputs]

    def loss(name, *inputs):
        return jnp.sum(jnp.sin(IMPLEMENTATIONS[name](*inputs, mask, scale=0.5)))

    results = []
    for name in PLAIN:
        f = functools.partial(loss, name)

        @jax.jit
        def both(*x, f=f):
            return jax.grad(f, argnums=(0, 1, 2))(*x), jax.jvp(f, x, tuple(tangents))[1]

        grads, slope = both(*inputs)
        along = sum(jnp.sum(g) for g in grads)
        np.testing.assert_allclose(slope, along, rtol=1e-3)
        results.append(grads)
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_bfloat16_has_a_float32_softmax():
    inputs, mask = make(40, 40, jnp.bfloat16), make_mask(40, 40, None, True)
    wanted = by_loops(*inputs, mask, 0.3, None)
    for name in PLAIN:
        found = jax.jit(functools.partial(IMPLEMENTATIONS[name], scale=0.3))(*inputs, mask)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=0.05)


def test_cudnn_refuses_a_soft_cap():
    with pytest.raises(ValueError, match="has no soft cap"):
        attention.cudnn(*make(3, 3), make_mask(3, 3, None, True), scale=1.0, cap=1.0)


@pytest.mark.gpu
def test_cudnn_is_the_same():
    inputs, mask = make(64, 64, jnp.bfloat16), make_mask(64, 64, None, True)
    inputs = [jnp.repeat(x, 22, axis=-1)[..., :64] for x in inputs]
    found = jax.jit(functools.partial(attention.cudnn, scale=0.3))(*inputs, mask)
    wanted = attention.xla(*inputs, mask, scale=0.3)
    np.testing.assert_allclose(found.astype("float32"), wanted.astype("float32"), atol=0.05)
