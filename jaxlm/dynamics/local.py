r"""Local gradient methods: workers take local steps and average their parameters now and then.

A round is the H local steps between two averages. H is computed on the host in float64, because in
float32 the integer part of $(\alpha/\eta)^2$ would sometimes be off by one. H never depends on
data, so the steps at which workers average are known before a run starts.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jaxlm.core.checks import integer, real
from jaxlm.core.dtypes import wide
from jaxlm.core.errors import UserError
from jaxlm.typing import Batch, Params

__all__ = [
    "HSchedule",
    "LocalOptimizer",
    "LocalState",
    "Workers",
    "comm_fraction",
    "constant_h",
    "linear_h",
    "local_update",
    "qsr",
    "run_workers",
    "start_workers",
    "sync_steps",
]

HSchedule = Callable[[int, float], int]
"""`(step, learning rate at that step) -> H` of the round that starts there."""

LearningRate = Callable[[int], Any]
"""`step -> learning rate`, such as an optax schedule, which is evaluated in its own precision."""

NEVER = 2**31 - 1


def constant_h(h: int) -> HSchedule:
    """Return a schedule of H local steps in every round; 1 averages after every step.

    >>> constant_h(4)(1000, 1e-3)
    4
    """
    integer("h", h)
    return lambda step, lr: h


def linear_h(
    beta: float | int,
    h_base: int = 1,
    *,
    warmup_steps: int = 0,
    warmup_h: int | None = None,
    total_steps: int | None = None,
) -> HSchedule:
    r"""Return the linear rule, $H = \max(H_{base}, \lfloor \beta/\eta \rfloor)$.

    The other arguments and the references are those of `qsr`.

    >>> linear_h(0.02, 2)(0, 0.001)
    20
    """
    real("beta", beta, above=0)
    return qsr(
        beta,
        h_base,
        1.0,
        warmup_steps=warmup_steps,
        warmup_h=warmup_h,
        total_steps=total_steps,
    )


def qsr(
    alpha: float | int,
    h_base: int,
    power: float | int = 2.0,
    *,
    warmup_steps: int = 0,
    warmup_h: int | None = None,
    total_steps: int | None = None,
) -> HSchedule:
    r"""Return the quadratic rule (QSR), $H = \max(H_{base}, \lfloor(\alpha/\eta)^2\rfloor)$.

    η is the learning rate at the first step of the round.

    Args:
        alpha: α, above 0. For a constant H, use `constant_h`.
        h_base: the smallest H.
        power: 2; the paper compares with 1 and 3.
        warmup_steps: rounds that start before this step have `warmup_h`.
        warmup_h: H during warm-up; None means `h_base`. The paper uses the rule's H at the peak.
        total_steps: if given, no round extends beyond it.

    Raises:
        UserError: if α is not positive, or an H is below 1.

    References:
        Gu, Lyu, Arora, Zhang, Huang 2023, arXiv:2310.14423. In the authors' code the default power
        is 1, and the default α of 0 means a constant H.

    >>> [qsr(0.0175, 4)(0, lr) for lr in (0.008, 0.004, 0.001)]
    [4, 19, 306]
    """
    real("alpha", alpha, above=0)
    integer("h_base", h_base)
    integer("warmup_h", warmup_h)

    def schedule(step: int, lr: float | int) -> int:
        if step < warmup_steps:
            h = h_base if warmup_h is None else warmup_h
        else:
            real("learning rate", lr, least=0)
            # A learning rate of 0 would divide by 0, and a tiny one would overflow.
            never = lr == 0 or power * np.log(alpha / lr) > np.log(NEVER)
            h = NEVER if never else max(h_base, int((alpha / lr) ** power))
        return h if total_steps is None else max(1, min(h, total_steps - step))

    return schedule


def sync_steps(
    h_schedule: HSchedule, lr_schedule: LearningRate, total_steps: int
) -> Int[np.ndarray, " rounds"]:
    """Return the steps after which workers average, ascending; the last is `total_steps`.

    >>> sync_steps(constant_h(4), lambda step: 0.1, 10).tolist()
    [4, 8, 10]
    """
    steps, step = [], 0
    while step < total_steps:
        h = min(int(h_schedule(step, float(lr_schedule(step)))), total_steps - step)
        integer("h_schedule", h)
        step += h
        steps.append(step)
    return np.array(steps, np.int64)


def comm_fraction(h_schedule: HSchedule, lr_schedule: LearningRate, total_steps: int) -> float:
    """Return the communication of a run relative to averaging at every step.

    >>> comm_fraction(constant_h(4), lambda step: 0.1, 100)
    0.25
    """
    return len(sync_steps(h_schedule, lr_schedule, total_steps)) / total_steps


class LocalState(NamedTuple):
    """Each worker's state of its optimizer, and the number of local steps done by every one.

    The number alone decides when workers average.
    """

    inner: Any
    step: Int[Array, ""]


class LocalOptimizer(NamedTuple):
    """The functions of one worker, for use inside a `vmap` or `shard_map` with axis `axis_name`.

    Attributes:
        init: params -> `LocalState`.
        update: `(grads, state, params) -> (updates, state)`, as in optax, without communication.
        maybe_sync: `(params, state) -> (params, state)`; averages over workers at the end of a
            round.
        axis_name: the axis of the workers.
        sync_steps: the steps after which workers average.
    """

    init: Callable[[Params], LocalState]
    update: Callable[[Params, LocalState, Params], tuple[Params, LocalState]]
    maybe_sync: Callable[[Params, LocalState], tuple[Params, LocalState]]
    axis_name: str
    sync_steps: np.ndarray


def local_update(
    inner: optax.GradientTransformation,
    h_schedule: HSchedule,
    lr_schedule: LearningRate,
    axis_name: str = "data",
    *,
    total_steps: int,
    average: Sequence[str] = ("params",),
) -> LocalOptimizer:
    """Convert an optax optimizer to a local gradient method.

    After each of `sync_steps(h_schedule, lr_schedule, total_steps)`, the parameters of all workers
    become their mean, computed in at least float32. With H = 1, SGD with or without momentum equals
    SGD on the joint batch. Adaptive methods do not: their second moments see local batches.

    Args:
        inner: the optimizer, with its learning rate. It counts its own steps, the steps of the run.
        h_schedule: H of a round; see `constant_h`, `linear_h`, `qsr`.
        lr_schedule: step -> learning rate, that of `inner`.
        axis_name: the axis of the workers.
        total_steps: steps of the run. The last round is cut so that the run ends with an average;
            after the run, every step ends with one.
        average: "params", and "state" to average the floats of the optimizer's state as well.

    Raises:
        UserError: if `average` is something else.

    References:
        Gu, Lyu, Arora, Zhang, Huang 2023, arXiv:2310.14423, whose code averages parameters alone.
    """
    if "params" not in average or not set(average) <= {"params", "state"}:
        raise UserError(
            f"average: must be ('params',) or ('params', 'state') (got {tuple(average)}). Correct "
            "it."
        )
    plan = sync_steps(h_schedule, lr_schedule, total_steps)
    # A table instead of a comparison with H: the compiled step is the same for every schedule.
    ends = np.zeros(total_steps + 2, bool)
    ends[plan] = ends[-1] = True

    def init(params):
        return LocalState(inner.init(params), jnp.zeros((), jnp.int32))

    def update(grads, state, params):
        updates, inner_state = inner.update(grads, state.inner, params)
        return updates, LocalState(inner_state, state.step + 1)

    def mean(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return lax.pmean(wide(leaf), axis_name).astype(leaf.dtype)

    def sync(params, inner_state):
        params = jax.tree.map(mean, params)
        return params, jax.tree.map(mean, inner_state) if "state" in average else inner_state

    def maybe_sync(params, state):
        end = jnp.asarray(ends)[jnp.minimum(state.step, total_steps + 1)]
        params, inner_state = lax.cond(end, sync, lambda *same: same, params, state.inner)
        return params, LocalState(inner_state, state.step)

    return LocalOptimizer(init, update, maybe_sync, axis_name, plan)


class Workers(NamedTuple):
    """All workers: a tree of arrays that may be saved at any step, even inside a round.

    The leaves have a leading axis of K workers, except the number of steps.
    """

    params: Params
    state: LocalState


def start_workers(
    optimizer: LocalOptimizer, params: Params, count: int, *, mesh: Mesh | None = None
) -> Workers:
    """Return `count` workers with equal parameters.

    With a mesh, worker i lives on device i of its axis `optimizer.axis_name`.
    """

    def start(params):
        copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), params)
        inner = jax.vmap(lambda params: optimizer.init(params).inner)(copies)
        return Workers(copies, LocalState(inner, jnp.zeros((), jnp.int32)))

    params = jax.tree.map(jnp.asarray, params)
    if mesh is None:
        return start(params)
    spread = NamedSharding(mesh, PartitionSpec(optimizer.axis_name))
    replicated = NamedSharding(mesh, PartitionSpec())
    places: Any = Workers(spread, LocalState(spread, replicated))  # type: ignore[arg-type]
    # Compiled with output shardings, so that no device ever holds the copies of all workers.
    return jax.jit(start, out_shardings=places)(params)


def run_workers(
    optimizer: LocalOptimizer,
    value_and_grad: Callable[[Params, Batch], tuple[Any, Params]],
    workers: Workers,
    batches: Batch,
    *,
    mesh: Mesh | None = None,
) -> tuple[Workers, Any]:
    """Run S local steps of every worker, and the averages due at these steps.

    Rounds may start and end anywhere among the steps: all steps run in one loop that looks up
    whether a round ends. So compile time depends neither on H nor on S, and S steps in several
    calls give the same result as in one. Compile this function with `jax.jit`.

    Args:
        optimizer: see `local_update`.
        value_and_grad: `(params, batch) -> (value, grads)`; the values are returned as [K, S, ...].
        workers: from `start_workers` or an earlier call.
        batches: a tree of arrays [K, S, ...]: S batches for each of K workers.
        mesh: None runs all workers on one device by `vmap`; otherwise worker i runs on device i of
            the axis `optimizer.axis_name` by `shard_map`, and other axes are left to the compiler.

    >>> opt = local_update(optax.sgd(0.5), constant_h(2), lambda step: 0.5, total_steps=4)
    >>> loss = lambda x, target: 0.5 * (x - target) ** 2
    >>> workers = start_workers(opt, jnp.zeros(()), 2)
    >>> targets = jnp.array([[1.0, 1.0], [3.0, 3.0]])
    >>> workers, losses = run_workers(opt, jax.value_and_grad(loss), workers, targets)
    >>> workers.params.tolist(), losses.shape
    ([1.5, 1.5], (2, 2))
    """
    axis = optimizer.axis_name

    def run_worker(params, inner, step, batches):
        def body(carry, batch):
            params, state = carry
            value, grads = value_and_grad(params, batch)
            updates, state = optimizer.update(grads, state, params)
            return optimizer.maybe_sync(optax.apply_updates(params, updates), state), value

        (params, state), values = lax.scan(body, (params, LocalState(inner, step)), batches)
        return params, state.inner, state.step, values

    over_workers = (0, 0, None, 0)
    if mesh is None:
        run = jax.vmap(run_worker, over_workers, over_workers, axis_name=axis)
    else:
        count = jax.tree.leaves(workers.params)[0].shape[0]
        if mesh.shape[axis] != count:
            raise UserError(
                f"mesh: must have a device for each of {count} workers along {axis!r} (got "
                f"{mesh.shape[axis]}). Start as many workers."
            )
        own = PartitionSpec(axis)
        specs = (own, own, PartitionSpec(), own)
        run = jax.shard_map(
            # Each device has one worker, so the leading axis has size 1 and needs no name.
            jax.vmap(run_worker, over_workers, over_workers),
            mesh=mesh,
            in_specs=specs,
            out_specs=specs,
            axis_names={axis},
            # The branches of `maybe_sync` differ in whether values vary over workers, which the
            # check rejects.
            check_vma=False,
        )
    params, inner, step, values = run(workers.params, *workers.state, batches)
    return Workers(params, LocalState(inner, step)), values
