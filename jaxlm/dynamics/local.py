"""Local gradient methods: workers that step by themselves and average now and then."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jaxlm.core.errors import UserError
from jaxlm.dynamics.schedules import HSchedule, LearningRate, sync_steps
from jaxlm.typing import Batch, Params


class LocalState(NamedTuple):
    """State of one worker, or of all.

    Attributes:
      inner: of its optimizer; each worker has its own.
      step: local steps done, the same for all workers. The plan of averages depends on it alone.
    """

    inner: Any
    step: Int[Array, ""]


class LocalOptimizer(NamedTuple):
    """What one worker does, inside a `vmap` or `shard_map` with the axis `axis_name`.

    Attributes:
      init: params -> `LocalState`.
      update: `(grads, state, params) -> (updates, state)`, as in optax, without communication.
      maybe_sync: `(params, state) -> (params, state)`, the means over workers where a round ends.
      axis_name: of the workers.
      sync_steps: numbers of steps after which they average.
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
    """Makes a local gradient method of any optax optimizer.

    After `sync_steps(h_schedule, lr_schedule, total_steps)` steps the parameters of all workers
    become their mean, taken in at least float32. With H = 1, SGD with or without momentum is that
    on the joint batch; adaptive methods are not, since their second moments see local batches.

    Args:
      inner: with its learning rate. It counts its own steps, which are the steps of the run.
      h_schedule: H of a round; `constant_h`, `linear_h`, `qsr`.
      lr_schedule: step -> learning rate, that of `inner`.
      axis_name: of the workers.
      total_steps: of the run, whose last round is cut so that it ends in an average. Beyond it,
        every step does.
      average: what is averaged: "params", and "state" for the floats of the optimizer's state.

    Raises:
      UserError: `average` names something else.

    References:
      Gu, Lyu, Arora, Zhang, Huang 2023, arXiv:2310.14423, whose code averages parameters alone.
    """
    if "params" not in average or not set(average) <= {"params", "state"}:
        raise UserError(f"average is {tuple(average)}: give ('params',) or ('params', 'state').")
    plan = sync_steps(h_schedule, lr_schedule, total_steps)
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
        wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        return lax.pmean(wide, axis_name).astype(leaf.dtype)

    def meet(params, inner_state):
        params = jax.tree.map(mean, params)
        return params, jax.tree.map(mean, inner_state) if "state" in average else inner_state

    def maybe_sync(params, state):
        end = jnp.asarray(ends)[jnp.minimum(state.step, total_steps + 1)]
        params, inner_state = lax.cond(end, meet, lambda *same: same, params, state.inner)
        return params, LocalState(inner_state, state.step)

    return LocalOptimizer(init, update, maybe_sync, axis_name, plan)


class Workers(NamedTuple):
    """All workers: a tree of arrays that may be saved at any step, inside a round too.

    Attributes:
      params: with a leading axis of K workers.
      state: `LocalState` whose optimizer states have that axis; `step` has none.
    """

    params: Params
    state: LocalState


def start_workers(
    optimizer: LocalOptimizer, params: Params, count: int, *, mesh: Mesh | None = None
) -> Workers:
    """K workers that begin with equal parameters.

    Args:
      optimizer: of `local_update`.
      params: of one model.
      count: K.
      mesh: where given, worker i lives on device i of its axis `optimizer.axis_name`.
    """

    def start(params):
        copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), params)
        inner = jax.vmap(lambda params: optimizer.init(params).inner)(copies)
        return Workers(copies, LocalState(inner, jnp.zeros((), jnp.int32)))

    params = jax.tree.map(jnp.asarray, params)
    if mesh is None:
        return start(params)
    spread = NamedSharding(mesh, PartitionSpec(optimizer.axis_name))
    whole = NamedSharding(mesh, PartitionSpec())
    places: Any = Workers(spread, LocalState(spread, whole))  # type: ignore[arg-type]
    return jax.jit(start, out_shardings=places)(params)


def run_workers(
    optimizer: LocalOptimizer,
    value_and_grad: Callable[[Params, Batch], tuple[Any, Params]],
    workers: Workers,
    batches: Batch,
    *,
    mesh: Mesh | None = None,
) -> tuple[Workers, Any]:
    """S local steps of every worker, with the averages that fall on them.

    Rounds may begin and end anywhere among them: steps run in one loop that asks a table whether a
    round ends, so that neither H nor S makes compilation longer, and S steps in several calls give
    what one call gives. Compile it by `jax.jit`.

    Args:
      optimizer: of `local_update`.
      value_and_grad: `(params, batch) -> (value, grads)`, such as `jax.value_and_grad(loss_fn)`.
      workers: as `start_workers` or this function returned them.
      batches: tree of arrays [K, S, ...]: S batches for each of K workers.
      mesh: None runs all workers on one device by `vmap`; otherwise worker i runs on device i of
        the axis `optimizer.axis_name`, by `shard_map`, and other axes are left to the compiler.

    Returns:
      (workers, values with axes [K, S, ...]).

    Raises:
      UserError: the mesh has another number of devices than there are workers.

    >>> from jaxlm.dynamics.schedules import constant_h
    >>> opt = local_update(optax.sgd(0.5), constant_h(2), lambda step: 0.5, total_steps=4)
    >>> loss = lambda x, target: 0.5 * (x - target) ** 2
    >>> workers = start_workers(opt, jnp.zeros(()), 2)
    >>> targets = jnp.array([[1.0, 1.0], [3.0, 3.0]])
    >>> workers, losses = run_workers(opt, jax.value_and_grad(loss), workers, targets)
    >>> workers.params.tolist(), losses.shape
    ([1.5, 1.5], (2, 2))
    """
    axis = optimizer.axis_name

    def one(params, inner, step, batches):
        def move(carry, batch):
            params, state = carry
            value, grads = value_and_grad(params, batch)
            updates, state = optimizer.update(grads, state, params)
            return optimizer.maybe_sync(optax.apply_updates(params, updates), state), value

        (params, state), values = lax.scan(move, (params, LocalState(inner, step)), batches)
        return params, state.inner, state.step, values

    if mesh is None:
        spread = jax.vmap(one, (0, 0, None, 0), (0, 0, None, 0), axis_name=axis)
    else:
        count = jax.tree.leaves(workers.params)[0].shape[0]
        if mesh.shape[axis] != count:
            raise UserError(
                f"there are {count} workers for the {mesh.shape[axis]} devices of the axis "
                f"{axis!r}: start as many."
            )
        every, own = PartitionSpec(), PartitionSpec(axis)
        spread = jax.shard_map(
            # On its device a worker is alone on the leading axis, which has no name here.
            jax.vmap(one, (0, 0, None, 0), (0, 0, None, 0)),
            mesh=mesh,
            in_specs=(own, own, every, own),
            out_specs=(own, own, every, own),
            axis_names={axis},
            check_vma=False,
        )
    params, inner, step, values = spread(workers.params, *workers.state, batches)
    return Workers(params, LocalState(inner, step)), values
