"""The key `dynamics` of a configuration: variants of the steps of a first-order run.

`dynamics: {name: svag, l: 4}` follows the optimizer's stochastic differential equation more
closely, `{name: noise}` measures gradient noise, and `{name: local, workers: 8}` takes local steps
on several workers. The number of steps does not change: schedules, evaluations and checkpoints
count them as before, so runs can be compared step by step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxlm.core import paths
from jaxlm.core.checks import number, one_of, whole
from jaxlm.core.errors import UserError
from jaxlm.train.first_order import FirstOrder, ScheduleFree
from jaxlm.train.settings import Optimizer
from jaxlm.train.state import Method, TrainState, first_order, many_steps, method
from jaxlm.typing import Batch, LossFn, Params, PRNGKey

Batches = Callable[[int, int], Batch]
"""`(first, count) -> batches` of the steps from `first`, leaves [count, ...]."""

Source = Callable[[int, Sequence[int]], Batches]
"""`(batch_size, seeds) -> batches` of leaves [count, seeds, batch_size, ...], a stream per seed."""

NOISE_INFO = ("grad_square", "grad_noise")
"""Metrics: G and N of a batch (`dynamics.noise.NoiseStats`), averaged over past steps."""

_SECTION, _MOST = "dynamics.", 2**12

SECOND_STREAM = 2**64
"""Added to a seed, it gives another order of the data, unlike that of any epoch of the first.

NumPy splits a seed into 32-bit words, and epochs and domains are further words after them.
"""


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """Base class of the variants.

    Attributes:
        name: key in `DYNAMICS`.
    """

    name: str

    def check(self, optimizer: Optimizer, batch_size: int) -> None:
        """Raise UserError if the variant does not fit the run."""
        self.with_gradients(optimizer)

    def with_gradients(self, optimizer: Optimizer) -> FirstOrder:
        """Return the optimizer; raise UserError if it computes no gradients."""
        if not isinstance(optimizer, FirstOrder):
            raise UserError(
                f"dynamics: {self.name} needs gradients, which the optimizer does not compute (got "
                f"{optimizer.name}). Give sgd or adamw."
            )
        if isinstance(optimizer, ScheduleFree):
            raise UserError(
                f"dynamics: {self.name} does not go with an average of the parameters (got "
                f"{optimizer.name}). Give sgd or adamw."
            )
        return optimizer

    def method(
        self, optimizer: FirstOrder, loss_fn: LossFn, steps: int, mesh: Mesh | None = None
    ) -> Method:
        """Return the training step on a mesh; `loss_fn` as in `jaxlm.train.state.method`."""
        raise TypeError(f"{type(self).__name__} does not define method")

    def batches(
        self, source: Source, optimizer: FirstOrder, *, batch_size: int, seed: int
    ) -> Batches:
        """Return the batches that the steps read."""
        raise TypeError(f"{type(self).__name__} does not define batches")

    def report(self, optimizer: Optimizer, steps: int, opt_state: Any) -> dict[str, Any]:
        """Return what the variant adds to the summary of a finished run."""
        raise TypeError(f"{type(self).__name__} does not define report")


@dataclass(frozen=True, kw_only=True)
class Svag(Dynamics):
    """Stochastic variance amplified gradient, see `jaxlm.dynamics.svag`.

    A step makes l updates, or l² with Adam, and each update reads two batches. The schedule of the
    learning rate covers all updates. With l = 1 it is the optimizer itself.

    Attributes:
        l: the l of SVAG, at least 1.
        pairing: "independent" takes the two batches from two orders of the data; "consecutive"
            takes them one after the other from one order, as the authors' code does.
    """

    name: str = "svag"
    l: int
    pairing: Literal["independent", "consecutive"] = "independent"

    def __post_init__(self):
        whole(self, "l", most=_MOST, section=_SECTION)
        one_of("dynamics.pairing", self.pairing, ("independent", "consecutive"))

    def check(self, optimizer: Optimizer, batch_size: int) -> None:
        """See `Dynamics`; clipping, and optimizers without a scaling rule, are refused too."""
        chosen = self.with_gradients(optimizer)
        chosen.hparams(1)
        if chosen.clip is not None:
            raise UserError(
                "optimizer.clip: acts more strongly on gradients with amplified noise, so svag "
                f"would not follow the equation (got {chosen.clip}). Leave it out."
            )

    def _svag(self, optimizer: FirstOrder) -> Any:
        from jaxlm.dynamics import svag

        kind = "sgd" if optimizer.hparams(1).b2 is None else "adaptive"
        return svag(self.l, kind)

    def method(
        self, optimizer: FirstOrder, loss_fn: LossFn, steps: int, mesh: Mesh | None = None
    ) -> Method:
        svag = self._svag(optimizer)
        scaled = svag.hparams(optimizer.hparams(steps))

        def value_and_grad(loss_fn: LossFn) -> Callable[..., Any]:
            amplified = svag.value_and_grad(loss_fn, has_aux=True)
            return lambda params, pair: amplified(params, _part(pair, 0), _part(pair, 1))

        way = first_order(
            optimizer.with_hparams(scaled).transform(scaled.steps),
            loss_fn,
            select=optimizer.select,
            value_and_grad=value_and_grad,
        )
        updates = many_steps(way.step)

        def step(params: Params, opt_state: Any, pairs: Batch) -> Any:
            (params, opt_state), infos = updates(TrainState(params, opt_state), pairs)
            return params, opt_state, jax.tree.map(jnp.mean, infos)

        passes = 2 * svag.steps_mult
        return Method(way.init, step, forwards=passes, backwards=passes, rows=2)

    def batches(
        self, source: Source, optimizer: FirstOrder, *, batch_size: int, seed: int
    ) -> Batches:
        """Return batches with leaves [count, updates, 2, batch_size, ...]."""
        updates = self._svag(optimizer).steps_mult
        if self.pairing == "consecutive":
            pairs = source(2 * updates * batch_size, (seed,))
            return _shaped(pairs, lambda x: x.reshape(-1, updates, 2, batch_size, *x.shape[3:]))
        halves = source(updates * batch_size, (seed, seed + SECOND_STREAM))
        return _shaped(
            halves,
            lambda x: x.reshape(-1, 2, updates, batch_size, *x.shape[3:]).swapaxes(1, 2),
        )

    def report(self, optimizer: Optimizer, steps: int, opt_state: Any) -> dict[str, Any]:
        """Return the number of updates."""
        return {"updates": steps * self._svag(self.with_gradients(optimizer)).steps_mult}


@dataclass(frozen=True, kw_only=True)
class Noise(Dynamics):
    """The optimizer itself, on a batch in parts whose gradients measure the noise.

    The gradient is the mean over the parts, which is that of the batch if all have equally many
    targets. Activations of one part at a time are in memory.

    Attributes:
        parts: number of parts, at least 2, a divisor of the batch size.
    """

    name: str = "noise"
    parts: int = 4

    def __post_init__(self):
        whole(self, "parts", least=2, most=_MOST, section=_SECTION)

    def check(self, optimizer: Optimizer, batch_size: int) -> None:
        """See `Dynamics`; the number of parts must divide the batch size."""
        super().check(optimizer, batch_size)
        _check_divides("dynamics.parts", self.parts, batch_size)

    def method(
        self, optimizer: FirstOrder, loss_fn: LossFn, steps: int, mesh: Mesh | None = None
    ) -> Method:
        """See `Dynamics`; info has `grad_square` and `grad_noise`, averaged over steps."""
        from jaxlm.dynamics.noise import RunningNoise, value_and_grad_with_noise

        def value_and_grad(loss_fn: LossFn) -> Callable[..., Any]:
            measured = value_and_grad_with_noise(loss_fn, has_aux=True)

            def fn(params: Params, parts: Batch) -> Any:
                (loss, stats, aux), grads = measured(params, parts)
                aux = {name: jnp.mean(value) for name, value in aux.items()}
                return (loss, {**aux, "stats": stats}), grads

            return fn

        way = first_order(
            optimizer.transform(steps),
            loss_fn,
            select=optimizer.select,
            value_and_grad=value_and_grad,
        )

        def init(params: Params, key: PRNGKey) -> Any:
            return way.init(params, key), RunningNoise.zeros()

        def step(params: Params, opt_state: Any, parts: Batch) -> Any:
            inner, noise = opt_state
            params, inner, info = way.step(params, inner, parts)
            noise = noise.add(info.pop("stats"))
            stats = noise.stats
            info |= dict(zip(NOISE_INFO, (stats.G, stats.N / self.parts), strict=True))
            return params, (inner, noise), info

        return Method(init, step, forwards=1, backwards=1, rows=1)

    def batches(
        self, source: Source, optimizer: FirstOrder, *, batch_size: int, seed: int
    ) -> Batches:
        """Return batches with leaves [count, parts, batch_size / parts, ...]."""
        return _in_parts(source, self.parts, batch_size, seed)

    def report(self, optimizer: Optimizer, steps: int, opt_state: Any) -> dict[str, Any]:
        """Return G and N of a batch near the end of the run, see `dynamics.noise.NoiseStats`.

        `ratio` is N/G; null where G is not above 0.
        """
        if not steps:
            return {"gradient_noise": None}
        stats = opt_state[1].stats
        G, N = float(stats.G), float(stats.N) / self.parts
        return {"gradient_noise": {"G": G, "N": N, "ratio": N / G if G > 0 else None}}


@dataclass(frozen=True, kw_only=True)
class Local(Dynamics):
    """Local steps of several workers, which average their parameters from time to time.

    Each worker reads an equal part of a step's batch. Evaluations and checkpoints see the last
    average, and the run ends with one. With at least as many devices as workers, each worker has
    its own; otherwise all share one. Memory: one copy of the parameters beside those of the
    workers. SGD with H = 1 equals SGD on the whole batch if all parts have equally many targets.

    Attributes:
        workers: number of workers, at least 2, a divisor of the batch size.
        rule: how H, the number of steps between averages, depends on the learning rate η:
            "constant", "linear" in 1/η or quadratic, "qsr"; see `jaxlm.dynamics.qsr`.
        h: H, or its smallest value.
        alpha: the coefficient of "linear" and "qsr". During warmup H is that of the highest
            learning rate.
    """

    name: str = "local"
    workers: int = 2
    rule: Literal["constant", "linear", "qsr"] = "constant"
    h: int = 4
    alpha: float | None = None

    def __post_init__(self):
        whole(self, "workers", least=2, most=_MOST, section=_SECTION)
        whole(self, "h", section=_SECTION)
        number(self, "alpha", section=_SECTION)
        one_of("dynamics.rule", self.rule, ("constant", "linear", "qsr"))
        if self.rule == "constant" and self.alpha is not None:
            raise UserError(
                f"dynamics.alpha: is not used by the rule constant (got {self.alpha}). Give the "
                "rule linear or qsr."
            )
        if self.rule != "constant" and (self.alpha is None or self.alpha <= 0):
            raise UserError(
                f"dynamics.alpha: must be above 0 for the rule {self.rule} (got {self.alpha}). "
                "Give it, or the rule constant."
            )

    def check(self, optimizer: Optimizer, batch_size: int) -> None:
        """See `Dynamics`; the number of workers must divide the batch size."""
        super().check(optimizer, batch_size)
        _check_divides("dynamics.workers", self.workers, batch_size)

    def _plan(self, optimizer: FirstOrder, steps: int) -> tuple[Any, Callable[[int], Any]]:
        from jaxlm import dynamics

        rates = optimizer.rates(steps)
        if self.alpha is None:
            return dynamics.local.constant_h(self.h), rates.__getitem__
        make = dynamics.qsr if self.rule == "qsr" else dynamics.local.linear_h
        at_peak = make(self.alpha, self.h)(0, optimizer.learning_rate)
        h = make(self.alpha, self.h, warmup_steps=optimizer.warmup_steps(steps), warmup_h=at_peak)
        return h, rates.__getitem__

    def method(
        self, optimizer: FirstOrder, loss_fn: LossFn, steps: int, mesh: Mesh | None = None
    ) -> Method:
        from jaxlm import dynamics
        from jaxlm.sharding import make_mesh

        local = dynamics.local_update(
            optimizer.transform(steps), *self._plan(optimizer, steps), total_steps=steps
        )
        if mesh is None and len(jax.devices()) >= self.workers:
            mesh = make_mesh(data=self.workers)
        if mesh is not None and mesh.shape["data"] != self.workers:
            raise UserError(
                f"dynamics.workers: must be the size of the mesh axis data, {mesh.shape['data']} "
                f"(got {self.workers}). Correct one of them."
            )
        ends = jnp.asarray(local.sync_steps)

        def init(params: Params, key: PRNGKey) -> Any:
            del key
            trained = paths.split(params, optimizer.select)[0]
            return dynamics.local.start_workers(local, trained, self.workers, mesh=mesh)

        def step(params: Params, workers: Any, parts: Batch) -> Any:
            trained, frozen = paths.split(params, optimizer.select)
            differentiate = jax.value_and_grad(
                lambda part, batch: loss_fn(paths.merge(part, frozen), batch), has_aux=True
            )

            def value_and_grad(part: Params, batch: Batch) -> Any:
                (loss, aux), grads = differentiate(part, batch)
                return {"loss": loss, **aux, "grad_norm": optax.tree.norm(grads)}, grads

            batches = jax.tree.map(lambda leaf: leaf[:, None], parts)
            workers, infos = dynamics.local.run_workers(
                local, value_and_grad, workers, batches, mesh=mesh
            )
            trained = jax.lax.cond(
                jnp.isin(workers.state.step, ends),
                lambda: jax.tree.map(lambda leaf: leaf[0], workers.params),
                lambda: trained,
            )
            return paths.merge(trained, frozen), workers, jax.tree.map(jnp.mean, infos)

        return Method(init, step, forwards=1, backwards=1, mesh=mesh)

    def batches(
        self, source: Source, optimizer: FirstOrder, *, batch_size: int, seed: int
    ) -> Batches:
        """Return batches with leaves [count, workers, batch_size / workers, ...]."""
        return _in_parts(source, self.workers, batch_size, seed)

    def report(self, optimizer: Optimizer, steps: int, opt_state: Any) -> dict[str, Any]:
        """Return the number of averages, and its ratio to the number of steps."""
        from jaxlm.dynamics.local import sync_steps

        averages = len(sync_steps(*self._plan(self.with_gradients(optimizer), steps), steps))
        return {"averages": averages, "communication": averages / max(steps, 1)}


DYNAMICS: dict[str, type[Dynamics]] = {"svag": Svag, "noise": Noise, "local": Local}


def method_and_batches(
    optimizer: Optimizer,
    dynamics: Dynamics | None,
    loss_fn: LossFn,
    source: Source,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    mesh: Mesh | None = None,
) -> tuple[Method, Batches]:
    """Return the method of a run and the batches of its steps, on the mesh of the parameters."""
    if dynamics is None:
        batches = _shaped(source(batch_size, (seed,)), lambda x: x[:, 0])
        return method(optimizer, loss_fn, steps), batches
    chosen = dynamics.with_gradients(optimizer)
    batches = dynamics.batches(source, chosen, batch_size=batch_size, seed=seed)
    return dynamics.method(chosen, loss_fn, steps, mesh), batches


def _in_parts(source: Source, parts: int, batch_size: int, seed: int) -> Batches:
    size = batch_size // parts
    return _shaped(source(batch_size, (seed,)), lambda x: x.reshape(-1, parts, size, *x.shape[3:]))


def _shaped(batches: Batches, reshape: Callable[[Any], Any]) -> Batches:
    return lambda first, count: jax.tree.map(reshape, batches(first, count))


def _part(batch: Batch, place: int) -> Batch:
    return jax.tree.map(lambda leaf: leaf[place], batch)


def _check_divides(name: str, parts: int, batch_size: int) -> None:
    if batch_size % parts:
        raise UserError(
            f"{name}: must divide the batch size, {batch_size} (got {parts}). Correct it."
        )
