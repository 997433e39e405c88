"""Every optimizer of the family against NumPy, with the same noise, 20 steps in float64."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import zo
from jaxlm.core import paths
from jaxlm.zo.samplers import register

STEPS, EPS, RATE, DECAY = 20, 2.0**-4, 2.0**-5, 0.125
LAYERS, ROWS, COLUMNS, RANK, INTERVAL = 2, 5, 4, 2, 7
KERNEL, BIAS = "layers.kernel", "head.bias"
SHAPES = {
    KERNEL: (LAYERS, ROWS, COLUMNS),
    BIAS: (3,),
    f"{KERNEL}.left": (LAYERS, ROWS, RANK),
    f"{KERNEL}.right": (LAYERS, RANK, COLUMNS),
}
RUN_KEY = jax.random.key(5)
paths.declare_stacked({KERNEL: 2})


@register("keys", "table")
@dataclasses.dataclass(frozen=True)
class Injected(zo.Sampler):
    """Numbers from a table, a row for each key that is known."""

    keys: Any
    table: Mapping[str, Any]

    def sample(self, key, site):
        found = (self.keys == jax.random.key_data(key)[None]).all(1)
        numbers = jnp.where(found.any(), self.table[site.path][found.argmax()], jnp.nan)
        numbers = numbers if site.layer is None else numbers[site.layer]
        return numbers if site.rows is None else numbers[site.rows]


class Noise:
    """Normal numbers of NumPy for each direction of each step, and for each lazy factor."""

    def __init__(self, n):
        fold = jax.random.fold_in
        steps = [(t, j) for t in range(STEPS) for j in range(n)]
        keys = [fold(fold(fold(RUN_KEY, t), 0), j) for t, j in steps]
        lazy = [fold(RUN_KEY, i) for i in range(STEPS // INTERVAL + 1)]
        self.row = {name: i for i, name in enumerate([*steps, *range(len(lazy))])}
        rng = np.random.default_rng(0)
        count = len(self.row)
        self.table = {path: rng.standard_normal((count, *shape)) for path, shape in SHAPES.items()}
        self.keys = np.stack([jax.random.key_data(key) for key in [*keys, *lazy]])

    def sampler(self):
        return Injected(
            jnp.asarray(self.keys), {path: jnp.asarray(x) for path, x in self.table.items()}
        )

    def z(self, t, j):
        return {path: self.table[path][self.row[t, j]] for path in (KERNEL, BIAS)}

    def factor(self, side, row):
        return self.table[f"{KERNEL}.{side}"][self.row[row]]


def loss(xp, kernel, bias, batch):
    mixed = xp.log1p(xp.exp(xp.sin(kernel - batch).sum() / 3))
    return mixed + 0.1 * xp.cos(2 * kernel).sum() + xp.sin(bias - batch).sum() ** 2 / 4


def jax_loss(params, batch):
    return loss(jnp, params["layers"]["kernel"], params["head"]["bias"], batch)


def at(theta, batch, z=None, scale=0.0):
    moved = theta if z is None else {path: theta[path] + scale * z[path] for path in theta}
    return loss(np, moved[KERNEL], moved[BIAS], batch)


def central(theta, batch, z):
    return (at(theta, batch, z, EPS) - at(theta, batch, z, -EPS)) / (2 * EPS)


def scaled(factor, z):
    return {path: factor * z[path] for path in z}


def mean(items):
    return {path: sum(item[path] for item in items) / len(items) for path in items[0]}


class Reference:
    """NumPy's optimizers: `direction(t, theta, batch) -> u`."""

    def __init__(self, n):
        self.n, self.noise, self.memory = n, Noise(n), {}

    def zs(self, t):
        return [self.noise.z(t, j) for j in range(self.n)]

    def estimate(self, t, theta, batch):
        return mean([scaled(central(theta, batch, z), z) for z in self.zs(t)])

    mezo = estimate

    def one_sided(self, t, theta, batch):
        centre = at(theta, batch)
        slopes = [(at(theta, batch, z, EPS) - centre) / EPS for z in self.zs(t)]
        return mean([scaled(g, z) for g, z in zip(slopes, self.zs(t), strict=True)])

    def residual_feedback(self, t, theta, batch):
        now = [at(theta, batch, z, EPS) for z in self.zs(t)]
        before = self.memory.get("losses", now)
        self.memory["losses"] = now
        slopes = [(a - b) / EPS for a, b in zip(now, before, strict=True)]
        return mean([scaled(g, z) for g, z in zip(slopes, self.zs(t), strict=True)])

    def population(self, t, theta, batch):
        losses = np.array([at(theta, batch, z, EPS) for z in self.zs(t)])
        scores = (losses - losses.mean()) / losses.std()
        return mean([scaled(g, z) for g, z in zip(scores, self.zs(t), strict=True)])

    def averaged(self, name, decay, new):
        old = self.memory.get(name, scaled(0.0, new))
        self.memory[name] = {path: decay * old[path] + (1 - decay) * new[path] for path in new}
        return self.memory[name]

    def momentum(self, t, theta, batch):
        running = self.averaged("m", 0.9, self.estimate(t, theta, batch))
        return scaled(1 / (1 - 0.9 ** (t + 1)), running)

    def adam(self, t, theta, batch):
        new = self.estimate(t, theta, batch)
        m = self.averaged("m", 0.9, new)
        v = self.averaged("v", 0.99, {path: new[path] ** 2 for path in new})
        return {
            path: m[path] / (1 - 0.9 ** (t + 1)) / (np.sqrt(v[path] / (1 - 0.99 ** (t + 1))) + 1e-8)
            for path in new
        }

    def meazo(self, t, theta, batch):
        slopes = [central(theta, batch, z) for z in self.zs(t)]
        square = 0.9 * self.memory.get("v", 0.0) + 0.1 * np.mean(np.square(slopes))
        self.memory["v"] = square
        size = np.sqrt(square / (1 - 0.9 ** (t + 1))) + 1e-8
        return mean([scaled(g / size, z) for g, z in zip(slopes, self.zs(t), strict=True)])

    def fzoo(self, t, theta, batch):
        losses = np.array([at(theta, batch, z, EPS) for z in self.zs(t)])
        slopes = (losses - at(theta, batch)) / losses.std()
        return mean([scaled(g, z) for g, z in zip(slopes, self.zs(t), strict=True)])

    def lozo(self, t, theta, batch, momentum=None, scale=RANK**-0.5):
        """As the authors' code has it at scale 1: weights W [out, in] move by U V^T."""
        lefts = [self.noise.factor("right", (t, j)).mT for j in range(self.n)]
        right = self.noise.factor("left", t // INTERVAL)
        zs = [
            {KERNEL: (scale * left @ right.mT).mT, BIAS: self.noise.z(t, j)[BIAS]}
            for j, left in enumerate(lefts)
        ]
        slopes = [central(theta, batch, z) for z in zs]
        left = sum(scale * g * left for g, left in zip(slopes, lefts, strict=True)) / self.n
        bias = sum(g * z[BIAS] for g, z in zip(slopes, zs, strict=True)) / self.n
        if momentum is not None:
            if t:
                old = self.memory["left"]
                if t % INTERVAL == 0:
                    before = self.noise.factor("left", t // INTERVAL - 1)
                    old = old @ before.mT @ right / before.shape[1]
                left = momentum * old + (1 - momentum) * left
                bias = momentum * self.memory["bias"] + (1 - momentum) * bias
            self.memory |= {"left": left, "bias": bias}
        return {KERNEL: (left @ right.mT).mT, BIAS: bias}

    def lozo_momentum(self, t, theta, batch):
        return self.lozo(t, theta, batch, momentum=0.9)

    def lozo_released(self, t, theta, batch):
        return self.lozo(t, theta, batch, scale=1.0)

    def lozo_momentum_released(self, t, theta, batch):
        return self.lozo(t, theta, batch, momentum=0.9, scale=1.0)

    def zo_muon(self, t, theta, batch):
        """As the authors' code has it: weights W [out, in] move by P u."""
        drawn = self.noise.factor("right", t // INTERVAL).mT
        basis = np.stack([reflections(x) for x in drawn])
        rights = [self.noise.factor("left", (t, j)).mT for j in range(self.n)]
        zs = [
            {KERNEL: (basis @ right).mT, BIAS: self.noise.z(t, j)[BIAS]}
            for j, right in enumerate(rights)
        ]
        centre = at(theta, batch)
        slopes = [(at(theta, batch, z, EPS) - centre) / EPS for z in zs]
        subspace = sum(c * right for c, right in zip(slopes, rights, strict=True)) / self.n
        bias = sum(c * z[BIAS] for c, z in zip(slopes, zs, strict=True)) / self.n
        steps = []
        for x in subspace:
            x = x / (np.linalg.norm(x) + 1e-7)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            steps.append(x)
        return {KERNEL: (basis @ np.stack(steps)).mT, BIAS: 1e-2 * bias}


def reflections(x):
    """The first columns of a product of Householder reflections, one after another."""
    n, r = x.shape
    q, signs = np.eye(n), []
    for j in range(r):
        v = np.concatenate([np.zeros(j), x[j:, j]])
        signs.append(-1 if v[j] < 0 else 1)
        v[j] += signs[-1] * np.linalg.norm(x[j:, j])
        q = q @ (np.eye(n) - 2 * np.outer(v, v) / (v @ v))
    return -q[:, :r] * np.array(signs)


def compositions(base):
    low_rank, subspace = (
        make(RANK, interval=INTERVAL, base=base) for make in (zo.low_rank, zo.subspace)
    )
    return {
        "mezo": {},
        "one_sided": {"estimator": zo.one_sided},
        "residual_feedback": {"estimator": zo.residual_feedback},
        "population": {"estimator": zo.population},
        "momentum": {"rule": zo.rules.replayed_momentum(0.9, horizon=STEPS)},
        "adam": {"rule": zo.rules.replayed_adam(0.9, 0.99, horizon=STEPS)},
        "meazo": {"rule": zo.rules.normalized_by_average(0.9)},
        "fzoo": {"estimator": zo.one_sided, "rule": zo.rules.normalized_by_spread()},
        "lozo": {"sampler": low_rank},
        "lozo_momentum": {"sampler": low_rank, "rule": zo.factored.factored_momentum(0.9)},
        "lozo_released": {"sampler": dataclasses.replace(low_rank, scale=1.0)},
        "lozo_momentum_released": {
            "sampler": dataclasses.replace(low_rank, scale=1.0),
            "rule": zo.factored.factored_momentum(0.9),
        },
        "zo_muon": {
            "estimator": zo.one_sided,
            "sampler": subspace,
            "rule": zo.factored.orthogonalized(vector_scale=1e-2),
        },
    }


# One direction takes another way through `combine`; what rules and estimators do is alike.
CASES = [*((name, 3) for name in compositions(zo.gaussian())), ("mezo", 1), ("lozo", 1)]
RELEASED = ("lozo_released", "lozo_momentum_released")


@pytest.mark.parametrize(
    ("name", "n"),
    [pytest.param(*case, marks=pytest.mark.slow if case[0] in RELEASED else ()) for case in CASES],
)
def test_twenty_steps_are_those_of_numpy(name, n):
    reference = Reference(n)
    rng = np.random.default_rng(1)
    theta = {KERNEL: rng.standard_normal(SHAPES[KERNEL]), BIAS: rng.standard_normal(3)}
    batches = rng.standard_normal(STEPS)
    with jax.enable_x64(True):
        options = {"sampler": reference.noise.sampler()}
        options |= compositions(options["sampler"])[name]
        opt = zo.zeroth_order(RATE, eps=EPS, num_directions=n, weight_decay=DECAY, **options)
        params = {
            "layers": {"kernel": jnp.asarray(theta[KERNEL])},
            "head": {"bias": jnp.asarray(theta[BIAS])},
        }
        state = opt.init(params, RUN_KEY)
        step = jax.jit(lambda params, state, batch: opt.step(jax_loss, params, state, batch))
        for t in range(STEPS):
            direction = getattr(reference, name)(t, theta, batches[t])
            decayed = {KERNEL: DECAY * theta[KERNEL], BIAS: 0.0}
            theta = {path: theta[path] - RATE * (direction[path] + decayed[path]) for path in theta}
            params, state, info = step(params, state, jnp.asarray(batches[t]))
            assert info.moved_fraction == 1 or name == "residual_feedback"
        # The state keeps its types, which are those of the parameters.
        assert step._cache_size() == 1
        floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert all(x.dtype == jnp.float64 for x in floats)
        assert params["head"]["bias"].dtype == jnp.float64
        np.testing.assert_allclose(params["layers"]["kernel"], theta[KERNEL], rtol=0, atol=1e-10)
        np.testing.assert_allclose(params["head"]["bias"], theta[BIAS], rtol=0, atol=1e-10)


def test_twenty_steps_with_a_residual_are_those_of_numpy():
    """The same method, whose parameters are only rewritten every few steps."""
    n = 3
    reference = Reference(n)
    rng = np.random.default_rng(1)
    theta = {KERNEL: rng.standard_normal(SHAPES[KERNEL]), BIAS: rng.standard_normal(3)}
    with jax.enable_x64(True):
        opt = zo.lozo_residual(
            RATE,
            rank=RANK,
            interval=INTERVAL,
            base=reference.noise.sampler(),
            eps=EPS,
            num_directions=n,
        )
        params = start = {
            "layers": {"kernel": jnp.asarray(theta[KERNEL])},
            "head": {"bias": jnp.asarray(theta[BIAS])},
        }
        state = opt.init(params, RUN_KEY)
        step = jax.jit(lambda params, state, batch: opt.step(jax_loss, params, state, batch))
        for t in range(STEPS):
            direction = reference.lozo(t, theta, 0.5)
            theta = {path: theta[path] - RATE * direction[path] for path in theta}
            params, state, _ = step(params, state, jnp.asarray(0.5))
            if t == INTERVAL - 2:
                np.testing.assert_array_equal(params["layers"]["kernel"], start["layers"]["kernel"])
        assert step._cache_size() == 1  # so the state keeps its types
        whole = opt.finalize(params, state)
        np.testing.assert_allclose(whole["layers"]["kernel"], theta[KERNEL], rtol=0, atol=1e-10)
        np.testing.assert_allclose(whole["head"]["bias"], theta[BIAS], rtol=0, atol=1e-10)
