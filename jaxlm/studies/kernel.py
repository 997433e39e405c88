"""Whether fine-tuning behaves like a kernel: kernels, fine-tuning, linearization, a verdict."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from jaxlm.artifacts.files import read_json, write_json
from jaxlm.artifacts.folder import check_inputs
from jaxlm.core.checks import distinct, integer
from jaxlm.data import TaskConfig, task_config
from jaxlm.kernels import solve
from jaxlm.studies.grid import Result, Say, check_seeds_and_output
from jaxlm.studies.kernel_behaviour import measure, record
from jaxlm.studies.kernel_table import markdown, rows
from jaxlm.studies.kernel_task import Kernels, draw_name, kernel_task
from jaxlm.studies.kernel_training import Training
from jaxlm.train.optimizers import Adam, Sgd
from jaxlm.train.run_folder import to_dict

DEFAULT_TRAINING = (
    Training(optimizer=Sgd(schedule="linear"), learning_rates=(1e-3, 1e-2)),
    Training(optimizer=Adam(name="adam", schedule="linear"), learning_rates=(1e-4, 1e-3)),
)


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """A study of kernel behaviour.

    Attributes:
        model: folder or hub id; null means the shipped model.
        task: the task; `ks` sets its number of examples.
        ks: training examples per class, a row of the table each; validation has as many.
        prompts: whether to put the text into the task's prompt, a row of the table each.
        calibrate: whether a prompted model starts from calibrated scores, see `kernel_task`.
        seeds: seeds of the examples drawn and of training; the table has means over them.
        training: the optimizers, each with its kernels and rows.
        solver: solver of symmetric kernels; asymmetric kernels have their own.
        plots: whether to plot the kernels and their accuracy; needs matplotlib.
        output: folder for reports, kernels and tables.
    """

    model: str | None = None
    task: TaskConfig = field(metadata={"make": task_config})
    ks: tuple[int, ...] = (16,)
    prompts: tuple[bool, ...] = (True,)
    calibrate: bool = False
    seeds: tuple[int, ...] = (0,)
    training: tuple[Training, ...] = DEFAULT_TRAINING
    solver: Literal["ridge", "logistic"] = "ridge"
    plots: bool = False
    output: str

    study: ClassVar[str] = "kernel"

    def __post_init__(self):
        for name in ("ks", "prompts"):
            distinct(name, getattr(self, name))
        for k in self.ks:
            integer("ks", k, least=2)
        # Reports are named by optimizer: its learning rates belong in one `training`.
        distinct("training", [each.optimizer.name for each in self.training])
        check_seeds_and_output(self)


class Case(NamedTuple):
    """One model, one draw of examples and one optimizer; `task` has its k."""

    task: TaskConfig
    prompt: bool
    seed: int
    training: Training

    @property
    def draw(self) -> str:
        """Name of the examples drawn and the prompt, which optimizers share."""
        return draw_name(self.prompt, self.task.k, self.seed)

    @property
    def name(self) -> str:
        """File name of the report."""
        return f"{self.draw}-{self.training.optimizer.name}.json"


def cases(config: KernelConfig) -> Iterator[Case]:
    """Yield every case of a study; cases with the same examples are adjacent."""
    for k, prompt, seed, training in itertools.product(
        config.ks, config.prompts, config.seeds, config.training
    ):
        task = dataclasses.replace(config.task, k=k, validation="hold_out")
        yield Case(task, prompt, seed, training)


def kernel_study(
    config: KernelConfig,
    *,
    base_dir: Path | None = None,
    mesh: Mesh | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Write the report of every case that has none, and return all reports.

    Reports are those of `jaxlm.studies.kernel_behaviour.record`. Relative paths of the task are
    looked up in `base_dir` first. `say` is called with a line before each case.
    """
    folder, todo = Path(config.output), list(cases(config))
    found = {case.name: _stored(folder, config, case) for case in todo}
    kernels: Any = None
    draw = ""
    for number, case in enumerate(todo, start=1):
        if found[case.name] is not None:
            continue
        say(f"case {number}/{len(todo)}: {folder / 'reports' / case.name}")
        if case.draw != draw:
            draw = case.draw
            # Each draw has its own shapes: compiled programs of all draws would fill the memory.
            jax.clear_caches()
            subject = kernel_task(
                config.model,
                case.task,
                seed=case.seed,
                prompt=case.prompt,
                calibrate=config.calibrate,
                base_dir=base_dir,
                mesh=mesh,
            )
            kernels = Kernels(subject, folder / "kernels" / draw)
        solvers = {kind: solve.SOLVERS[config.solver]() for kind in ("sgd", "signgd")}
        report = measure(kernels, case.training, seed=case.seed, solvers=solvers, say=say)
        made = {**record(report), "settings": _settings(config, case)}
        (folder / "reports").mkdir(parents=True, exist_ok=True)
        write_json(folder / "reports" / case.name, made)
        found[case.name] = made
    return [report for report in found.values() if report is not None]


def _settings(config: KernelConfig, case: Case) -> dict[str, Any]:
    """Return what a report depends on."""
    return {
        "model": config.model,
        "task": to_dict(case.task),
        "prompt": case.prompt,
        "calibrate": config.calibrate,
        "seed": case.seed,
        "training": to_dict(case.training),
        "solver": config.solver,
    }


_FIELDS: dict[str, Any] = {
    "settings": dict,
    "kernels": list,
    "task": str,
    "train_labels": list,
    "prompt": bool,
    "optimizer": str,
    "seed": int,
    **dict.fromkeys(("majority", "zero_shot", "fine_tuned", "linearized"), float),
    **dict.fromkeys(("gain_p", "null_linearized"), float),
}
"""Fields of a report that the table reads."""


def _stored(folder: Path, config: KernelConfig, case: Case) -> dict[str, Any] | None:
    path = folder / "reports" / case.name
    if not path.exists():
        return None
    report = read_json(path, **_FIELDS)
    check_inputs(folder, report["settings"], _settings(config, case))
    return report


def outline(config: KernelConfig, where: str, plan_flags: Mapping[str, str]) -> str:
    """Return the report file of every case, a line each."""
    del where, plan_flags
    return "\n".join(str(Path(config.output) / "reports" / case.name) for case in cases(config))


def run(
    config: KernelConfig, folder: Path, where: str, *, mesh: Mesh | None = None, say: Say = print
) -> Result:
    """Make the report of every case; see `jaxlm.studies.study`."""
    records = kernel_study(config, base_dir=Path(where).parent, mesh=mesh, say=say)
    figures: tuple[Path, ...] = ()
    if config.plots:
        from jaxlm.studies.kernel_plots import draw

        figures = tuple(draw(records, folder))
    return Result({"rows": rows(records)}, markdown(records), figures)


Config = KernelConfig
