"""The state of training, the method that updates it, and compiled programs with their memory."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from jaxlm.core import paths
from jaxlm.sharding import WHOLE, mesh_of, on_mesh, place_batch, place_params, replicated
from jaxlm.train.optimizers import FirstOrder, Optimizer, ScheduleFree, ZerothOrder
from jaxlm.typing import Batch, LossFn, Params, PRNGKey


class TrainState(NamedTuple):
    """Everything that changes in training; a random key is part of the optimizer's state."""

    params: Params
    opt_state: Any


class Method(NamedTuple):
    """An optimizer as the training loop uses it.

    Attributes:
        init: `(params, key) -> opt_state`.
        step: `(params, opt_state, batch) -> (params, opt_state, info)`; info maps names to scalars
            and holds `loss`.
        forwards, backwards: passes in a step.
        settings: what `jaxlm.zo.Trajectory` records of a zeroth-order optimizer, JSON values with
            `num_directions`; its info then holds `projected_grad` and `learning_rate`.
        rows: axis of the examples in a step's batch.
        mesh: the devices of the steps, if `init` places the state itself.
    """

    init: Callable[[Params, PRNGKey], Any]
    step: Callable[[Params, Any, Batch], tuple[Params, Any, dict[str, Any]]]
    forwards: int
    backwards: int
    settings: dict[str, Any] | None = None
    rows: int = 0
    mesh: Mesh | None = None

    def start(self, params: Params, key: PRNGKey) -> TrainState:
        """Return the state before the first step, on the devices of the steps."""
        if self.mesh is not None:
            params = place_params(params, self.mesh, WHOLE)
        elif (mesh := mesh_of(params)) is not None:
            return TrainState(params, on_mesh(self.init, mesh, params, key))
        return TrainState(params, self.init(params, key))


def method(optimizer: Optimizer, loss_fn: LossFn, steps: int) -> Method:
    """Turn the configuration of an optimizer into a `Method` for a run of `steps` steps.

    The loss is `(params, batch, *, key=None, view=None) -> (loss, aux)`, aux a dict of scalars.
    """
    if isinstance(optimizer, ZerothOrder):
        return _zeroth_order(optimizer, loss_fn, steps)
    if isinstance(optimizer, FirstOrder):
        transform, select = optimizer.transform(steps), optimizer.select
        averaged = optimizer if isinstance(optimizer, ScheduleFree) else None
        return first_order(transform, loss_fn, select=select, averaged=averaged)
    raise TypeError(f"{type(optimizer).__name__} is not an optimizer of jaxlm.train.optimizers")


def _zeroth_order(config: ZerothOrder, loss_fn: LossFn, steps: int) -> Method:
    opt = config.build(steps)

    def step(params: Params, opt_state: Any, batch: Batch) -> tuple[Params, Any, dict[str, Any]]:
        params, opt_state, info = opt.step(loss_fn, params, opt_state, batch)
        aux = {name: jnp.mean(value) for name, value in (info.aux or {}).items()}
        named = {"loss": info.loss, **aux, "projected_grad": info.projected_grad}
        named |= {"moved_fraction": info.moved_fraction, "learning_rate": info.learning_rate}
        return params, opt_state, named

    settings = {**opt.settings, "optimizer": dataclasses.asdict(config), "steps": steps}
    return Method(opt.init, step, forwards=opt.forwards, backwards=0, settings=settings)


def first_order(
    transform: optax.GradientTransformation,
    loss_fn: LossFn,
    *,
    select: paths.Select = None,
    value_and_grad: Callable[[LossFn], Callable[..., Any]] | None = None,
    averaged: ScheduleFree | None = None,
) -> Method:
    """Return a `Method` from an optax transformation of the selected parameters.

    `value_and_grad` replaces `jax.value_and_grad` with `has_aux=True`. With `averaged`, the
    parameters are averages of those that the transformation changes.
    """
    differentiate = value_and_grad or functools.partial(jax.value_and_grad, has_aux=True)

    def init(params: Params, key: PRNGKey) -> Any:
        del key
        return transform.init(paths.split(params, select)[0])

    def step(params: Params, opt_state: Any, batch: Batch) -> tuple[Params, Any, dict[str, Any]]:
        trained, frozen = paths.split(params, select)
        fn = differentiate(lambda part, batch: loss_fn(paths.merge(part, frozen), batch))
        point = trained if averaged is None else averaged.point(trained, opt_state)
        (loss, aux), grads = fn(point, batch)
        updates, opt_state = transform.update(grads, opt_state, point)
        trained = optax.apply_updates(point, updates)
        if averaged is not None:
            trained = averaged.average(trained, opt_state)
        info = {"loss": loss, **aux, "grad_norm": optax.tree.norm(grads)}
        return paths.merge(trained, frozen), opt_state, info

    return Method(init, step, forwards=1, backwards=1)


def many_steps(step: Callable[..., Any]) -> Callable[[TrainState, Batch], Any]:
    """Return `(state, batches) -> (state, infos)`: a step for each entry of axis 0 of batches."""

    def run(state: TrainState, batches: Batch) -> tuple[TrainState, dict[str, Any]]:
        def body(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
            params, opt_state, info = step(state.params, state.opt_state, batch)
            return TrainState(params, opt_state), info

        return lax.scan(body, state, batches)

    return run


class Program:
    """A function compiled for each shape and sharding of its arguments, and the memory it takes.

    It runs on the mesh of its first argument, or on one device. On a mesh the last argument, a
    batch whose rows are on the axis `rows`, is sharded by rows, and results are replicated.

    Attributes:
        peak_bytes: arguments + outputs + temporaries - aliased, of the largest compilation so far.
        compile_seconds: time spent compiling so far.
        moves: whether the first argument is a state that the first result replaces: it is donated,
            and its sharding is kept.
    """

    def __init__(self, function: Callable[..., Any], *, moves: bool = False, rows: int = 0):
        self.peak_bytes = 0
        self.compile_seconds = 0.0
        self._function, self._moves, self._rows = function, moves, rows
        self._compiled: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        mesh = mesh_of(args[0])
        if mesh is not None:
            args = (*args[:-1], place_batch(args[-1], mesh, self._rows))
        leaves, structure = jax.tree.flatten(args)
        shapes = tuple(
            (jnp.shape(leaf), leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves
        )
        program = self._compiled.get((structure, shapes))
        if program is None:
            begin = time.perf_counter()
            program = self.lower(*args).compile()
            self._compiled[structure, shapes] = program
            self.compile_seconds += time.perf_counter() - begin
            self.peak_bytes = max(self.peak_bytes, _peak_bytes(program))
        return program(*args)

    def lower(self, *args: Any) -> Any:
        """Lower the function for arguments that need only have shapes, dtypes and shardings."""
        mesh = mesh_of(args[0])
        places: Any = None
        if mesh is not None:
            places = replicated(mesh)
            if self._moves:
                places = (jax.tree.map(lambda leaf: leaf.sharding, args[0]), places)
        donated = (0,) if self._moves else ()
        return jax.jit(self._function, donate_argnums=donated, out_shardings=places).lower(*args)


def _peak_bytes(program: Any) -> int:
    use = program.memory_analysis()
    if use is None:
        return 0
    total = use.argument_size_in_bytes + use.output_size_in_bytes + use.temp_size_in_bytes
    return int(total - use.alias_size_in_bytes)


def free(tree: Any, *, keep: Any = ()) -> None:
    """Delete the arrays of a tree at once, except those that are also in `keep`."""
    kept = {id(leaf) for leaf in jax.tree.leaves(keep)}
    for leaf in jax.tree.leaves(tree):
        if id(leaf) not in kept:
            leaf.delete()


def device_peak_bytes() -> int | None:
    """Return the peak memory that the first device reports; None if it reports none (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")
