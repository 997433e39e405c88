"""The training loop: several steps in one dispatch, and exact resumption from checkpoints."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import __version__
from jaxlm.artifacts.arrays import check_tree_finite
from jaxlm.artifacts.stopping import Stopped, defer_signals, pending_signal
from jaxlm.core.checks import whole
from jaxlm.core.errors import UserError
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.logging import Metrics, Progress, shown
from jaxlm.train.settings import MOST_STEPS
from jaxlm.train.state import Method, Program, TrainState, free, many_steps
from jaxlm.typing import Batch, Params, PRNGKey
from jaxlm.zo import Trajectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The length of a run, and how often it evaluates, saves and reads metrics.

    Attributes:
        steps: total number of updates.
        eval_every: steps between evaluations.
        checkpoint_every: steps between checkpoints; one is also written where validation is best.
        log_every: steps in one dispatch; the host reads their metrics together.
        patience: evaluations without a better monitored value after which the run stops; null for
            all steps. It needs validation.
    """

    steps: int
    eval_every: int = 100
    checkpoint_every: int = 100
    log_every: int = 10
    patience: int | None = None

    def __post_init__(self):
        whole(self, "steps", least=0, most=MOST_STEPS)
        whole(self, "eval_every", "checkpoint_every", "log_every", "patience")

    def dispatches(self, start: int) -> Iterator[tuple[int, int]]:
        """Yield (first step, number of steps) of each dispatch, the same ones in a resumed run."""
        while start < self.steps:
            every = (self.log_every, self.eval_every, self.checkpoint_every)
            end = min(self.steps, *(start - start % n + n for n in every))
            yield start, end - start
            start = end

    def is_over(self, step: int, best_step: int | None) -> bool:
        """Return whether the run ends after `step` steps, the best of which was `best_step`.

        It depends on nothing else, so a resumed run ends at the same step.
        """
        if step >= self.steps or self.patience is None or best_step is None:
            return step >= self.steps
        return step // self.eval_every - best_step // self.eval_every >= self.patience


FAR = 10
"""A run has diverged when its loss is this many times the first one, or that of guessing."""


class Diverged(UserError):
    """Raised when the loss or the parameters of a run are no longer finite."""


def first_diverged(losses: np.ndarray, first_loss: float, chance: float | None) -> int | None:
    """Return the index of the first loss of a run that has diverged; None if it has not.

    Such a loss is above `FAR` times the first one, or above `FAR` times that of guessing. It must
    also be above that of guessing and above twice the first one, since a run may begin with a loss
    near 0, or far above that of guessing. The mean of `losses` must be that high, too.

    >>> first_diverged(np.array([0.5, 17.0, 9.0]), 0.7, np.log(2))
    1
    >>> first_diverged(np.array([0.5, 0.1]), 0.01, np.log(2)) is None
    True
    """
    if first_loss <= 0:  # minus a reward, for example, has no such scale
        return None
    chance = first_loss if chance is None else chance
    limit = max(2 * first_loss, chance, FAR * min(first_loss, chance))
    if not np.mean(losses) > limit:
        return None
    return int(np.argmax(losses > limit))


class Record(NamedTuple):
    """What a checkpoint holds beside the state.

    Attributes:
        seconds: wall time of the run so far, including the time before it was resumed.
        stepping: the part of it spent in steps, without starting, compiling, evaluating and saving.
        best_step, best_value: step of the best monitored value so far, and that value.
        first_loss: mean loss of the first dispatch, with which later ones are compared.
        diverged: the first step whose loss was far above it, see `first_diverged`.
        peak_bytes: memory of the largest program compiled so far. It is kept because a run that
            was killed after its last step resumes without compiling anything.
    """

    seconds: float = 0.0
    stepping: float = 0.0
    best_step: int | None = None
    best_value: float | None = None
    first_loss: float | None = None
    diverged: int | None = None
    peak_bytes: int = 0

    @property
    def goodput(self) -> float:
        """The share of the wall time that went into steps."""
        return self.stepping / self.seconds if self.seconds else 0.0


class Outcome(NamedTuple):
    """The last state, the record, the scalars of each step of this process, and the last step."""

    state: TrainState
    record: Record
    infos: list[dict[str, Any]]
    steps: int


def fit(
    method: Method,
    params: Params,
    batches: Callable[[int, int], Batch],
    config: LoopConfig,
    *,
    key: PRNGKey,
    evaluate: Callable[[Params], dict[str, Any]] | None = None,
    monitor: str | None = None,
    mode: Literal["max", "min"] = "max",
    checkpoints: Checkpoints | None = None,
    trajectory: Path | None = None,
    metrics: Metrics | None = None,
    progress: Progress | None = None,
    chance: float | None = None,
) -> Outcome:
    """Train, or resume from the latest checkpoint if there is one.

    The given parameters are donated: their buffers are deleted. SIGINT, and in a command SIGTERM,
    stops the run after the steps in progress, with a checkpoint.

    Args:
        method: see `jaxlm.train.state.method`; `key` is the random key of its state.
        params: initial parameters.
        batches: `(first, count) -> batches` of the steps from `first`, stacked on axis 0; a pure
            function.
        config: length and schedule.
        evaluate: `params -> {name: value}`, for the metrics. The parameters with the best value of
            `monitor`, the highest or the lowest by `mode`, are kept in the checkpoints, and
            `config.patience` counts evaluations from there.
        checkpoints, metrics: where states, and scalars of each step, are saved; None for nowhere.
        trajectory: file for the scalars of a zeroth-order method, see `jaxlm.zo.Trajectory`.
        chance: the loss of guessing; see `first_diverged`.

    Raises:
        Diverged: if the loss or the parameters are no longer finite; checkpoints are kept.
        Stopped: if a signal came.
        UserError: if the trajectory is not that of these parameters and this method.
    """
    with defer_signals():
        sign = 1 if mode == "max" else -1
        loop = _Loop(config, evaluate, monitor, sign, checkpoints, metrics, progress, chance)
        return _fit(loop, method, params, batches, key, trajectory)


def _fit(
    loop: "_Loop",
    method: Method,
    params: Params,
    batches: Callable[[int, int], Batch],
    key: PRNGKey,
    trajectory: Path | None,
) -> Outcome:
    config, checkpoints = loop.config, loop.checkpoints
    state = method.start(params, key)
    latest = checkpoints.latest_step if checkpoints else None
    settings = method.settings
    if trajectory and settings is not None:
        loop.trajectory = _trajectory(trajectory, settings, params, key, latest)
    restored = checkpoints.restore(state, latest, donate=True) if checkpoints else None
    if loop.trajectory and settings and latest is not None:  # once the checkpoint has been read
        loop.trajectory.cut(latest, settings["steps"])
    if restored is None:
        start = 0
        loop.look_up(0, state)
    else:
        start, state, saved = restored
        free(params, keep=state)
        loop.record = Record(**saved)
        loop.saved = start
    run = loop.program = Program(many_steps(method.step), moves=True, rows=1 + method.rows)
    loop.ready()
    # One dispatch stays in flight: the device runs it while the host writes the one before.
    flight: list[tuple[int, Any]] = []
    step = start
    if loop.progress and not config.is_over(start, loop.record.best_step):
        loop.progress.say("compiling the steps")
    for first, count in config.dispatches(start):
        if config.is_over(first, loop.record.best_step):
            break
        if signal := pending_signal():
            while flight:
                loop.write(*flight.pop(0))
            loop.stop(signal, first, state)
        state, infos = run(state, batches(first, count))
        flight.append((first, infos))
        step = first + count
        due = step == config.steps or not (
            step % config.eval_every and step % config.checkpoint_every
        )
        while len(flight) > (0 if due else 1):
            loop.write(*flight.pop(0))
        if due:
            loop.look_up(step, state)
    if signal := pending_signal():
        loop.stop(signal, step, state)
    if loop.trajectory:
        loop.trajectory.finish(state.params)
    return Outcome(state, loop.elapsed(), loop.infos, step)


def _trajectory(
    path: Path, settings: dict[str, Any], params: Params, key: PRNGKey, step: int | None
) -> Trajectory | None:
    """Create a trajectory, or open that of a resumed run; None if the run began without one."""
    if step is None:
        return Trajectory.create(
            path,
            params,
            key=key,
            num_directions=settings["num_directions"],
            settings=settings,
            version=__version__,
        )
    if not path.exists():
        return None
    found = Trajectory.open(path)
    found.check(params, settings | {"steps": found.header.settings.get("steps")})
    return found


@jax.jit
def _all_finite(tree: Any) -> Any:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


@dataclasses.dataclass
class _Loop:
    """The side effects of `fit`: metrics, evaluations, checkpoints and progress."""

    config: LoopConfig
    evaluate: Callable[[Params], dict[str, Any]] | None
    monitor: str | None
    sign: int
    checkpoints: Checkpoints | None
    metrics: Metrics | None
    progress: Progress | None
    chance: float | None
    trajectory: Trajectory | None = None
    program: Program | None = None
    record: Record = dataclasses.field(default_factory=Record)
    saved: int | None = None
    infos: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._begin = self._mark = time.perf_counter()
        self._stepped = 0.0

    def ready(self) -> None:
        """Start the clock of the steps."""
        self._mark = time.perf_counter()

    def elapsed(self) -> Record:
        """Return the record with the time and the memory until now."""
        compiling, peak = 0.0, 0
        if self.program is not None:
            compiling, peak = self.program.compile_seconds, self.program.peak_bytes
        return self.record._replace(
            seconds=self.record.seconds + time.perf_counter() - self._begin,
            stepping=self.record.stepping + max(0.0, self._stepped - compiling),
            peak_bytes=max(self.record.peak_bytes, peak),
        )

    def write(self, first: int, infos: dict[str, Any]) -> None:
        """Fetch the metrics of one dispatch from the device and write them."""
        host = {name: np.asarray(x, np.float64) for name, x in jax.device_get(infos).items()}
        count = len(host["loss"])
        lines = [
            {"step": first + i + 1, **{name: value[i].tolist() for name, value in host.items()}}
            for i in range(count)
        ]
        bad = next((line for line in lines if not np.isfinite(line["loss"])), None)
        good = lines[: lines.index(bad)] if bad else lines
        self._watch(first, good)
        self.infos += good
        if self.trajectory:
            rates = host["learning_rate"][: len(good)]
            self.trajectory.append(first, host["projected_grad"][: len(good)], rates)
        if self.metrics:
            self.metrics.append(*good)
        if bad:
            self._stop(f"a loss of {bad['loss']} at step {bad['step']}")
        if self.progress and self.program:
            shown = [name for name in host if name == "loss" or name.endswith("accuracy")]
            means = {name: float(np.mean(host[name])) for name in ("loss", *shown)}
            self.progress.update(first + count, means, self.program.peak_bytes)

    def _watch(self, first: int, lines: list[dict[str, Any]]) -> None:
        """Mark the metrics of a run that has diverged, and say so once."""
        if not lines:
            return
        record, losses = self.record, np.array([line["loss"] for line in lines])
        first_loss = record.first_loss
        if first_loss is None:
            first_loss = float(np.mean(losses))
            record = record._replace(first_loss=first_loss)
        if record.diverged is None:
            place = first_diverged(losses, first_loss, self.chance)
            if place is not None:
                record = record._replace(diverged=first + place + 1)
                if self.monitor is None and self.saved is not None:
                    # Without a monitored value, the last parameters saved before are the best.
                    record = record._replace(best_step=self.saved)
                if self.progress:
                    self.progress.say(
                        f"diverged since step {record.diverged}: lower optimizer.learning_rate"
                    )
        self.record = record
        for line in lines:
            if record.diverged is not None and line["step"] >= record.diverged:
                line["diverged_since"] = record.diverged

    def _check_finite(self, step: int, state: TrainState) -> None:
        if _all_finite(state.params):
            return
        if self.program is None:
            check_tree_finite(state.params, "the parameters before the first step")
        self._stop(f"a parameter that is not finite after step {step}")

    def stop(self, signal: int, step: int, state: TrainState) -> None:
        """Save the state after `step` steps and raise `Stopped`."""
        self._check_finite(step, state)
        if self.checkpoints and self.saved != step:
            self._stepped += time.perf_counter() - self._mark
            self._save(step, state)
        said = f"stopped after step {step} of {self.config.steps}"
        if self.checkpoints:
            said += f"; the same command resumes from the checkpoint of step {step}"
        raise Stopped(said, signal)

    def _save(self, step: int, state: TrainState) -> None:
        assert self.checkpoints is not None
        self.checkpoints.save(step, state, self.elapsed()._asdict())
        self.saved = step

    def look_up(self, step: int, state: TrainState) -> None:
        """Evaluate and save if the schedule says so."""
        if self.program is not None:
            self._stepped += time.perf_counter() - self._mark
        self._check_finite(step, state)
        last, config = step == self.config.steps, self.config
        save = last or step % config.checkpoint_every == 0
        if self.evaluate and (last or step % config.eval_every == 0):
            values = self.evaluate(state.params)
            if self.metrics:
                self.metrics.append({"step": step, **values})
            if self.progress:
                self.progress.say(f"step {step}/{config.steps}  {shown(values)}")
            best, value = self.record.best_value, values.get(self.monitor or "")
            if value is not None and (best is None or self.sign * (value - best) > 0):
                self.record = self.record._replace(best_step=step, best_value=value)
                save = True
            if not last and config.is_over(step, self.record.best_step):
                save = True
                if self.progress:
                    self.progress.say(
                        f"stopped early: {self.monitor} was best at step {self.record.best_step}"
                    )
        if self.checkpoints and save:
            self._save(step, state)
        self.ready()

    def _stop(self, what: str) -> None:
        kept = ""
        if self.checkpoints and self.saved is not None:
            kept = f"; the checkpoint of step {self.saved} is kept in {self.checkpoints.folder}"
        raise Diverged(f"optimizer.learning_rate: the run diverged (got {what}{kept}). Lower it.")
