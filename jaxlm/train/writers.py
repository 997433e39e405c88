"""Writers that send the metrics of a run to TensorBoard and to Weights & Biases."""

import contextlib
import importlib
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from jaxlm.artifacts.files import write_atomic
from jaxlm.artifacts.processes import is_main_process
from jaxlm.core.errors import UserError
from jaxlm.train.logging import numbers
from jaxlm.train.run_folder import RunFolder

Write = Callable[[Mapping[str, Any]], None]

PACKAGES = {"tensorboard": ("tensorboardX", "SummaryWriter"), "wandb": ("wandb", "init")}
"""Destination of metrics -> the package that writes there, and the name imported from it."""


def needed(name: str) -> Any:
    """Return what a writer imports from its package, which must be installed."""
    package, attribute = PACKAGES[name]
    try:
        return getattr(importlib.import_module(package), attribute)
    except (ImportError, AttributeError) as error:  # wandb's output folder imports as a package
        raise UserError(
            f"log_to: {name} needs {package} (got: {error}). pip install 'jaxlm[log]'."
        ) from None


@contextlib.contextmanager
def writing(names: Collection[str], folder: RunFolder, config: Mapping[str, Any]) -> Iterator[None]:
    """Also send the metrics of a run to `names`, keys of `PACKAGES`, while the block runs.

    A new writer gets the earlier lines as well.
    """
    if not is_main_process():
        yield
        return
    done = folder.latest_step()
    with contextlib.ExitStack() as stack:
        for name in names:
            new = done is None or not (folder.path / name).exists()
            begin = _tensorboard if name == "tensorboard" else _wandb
            write = stack.enter_context(begin(folder, config, 0 if new else (done or 0) + 1))
            for line in folder.metrics.read() if new else ():
                write(line)
            folder.metrics.writers.append(write)
        try:
            yield
        finally:
            folder.metrics.writers.clear()


@contextlib.contextmanager
def _tensorboard(folder: RunFolder, config: Mapping[str, Any], first: int) -> Iterator[Write]:
    """Write event files into the folder `tensorboard` of the run, from the step `first`."""
    del config
    path = str(folder.path / "tensorboard")
    # The suffix keeps the file of a run that is resumed within the second that names it.
    suffix = f".{first}"
    with needed("tensorboard")(path, purge_step=first, filename_suffix=suffix) as writer:

        def write(line: Mapping[str, Any]) -> None:
            values = numbers(line)
            step = values.pop("step")
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield write


@contextlib.contextmanager
def _wandb(folder: RunFolder, config: Mapping[str, Any], first: int) -> Iterator[Write]:
    """Write a run of Weights & Biases, whose files are in the folder `wandb` of the run."""
    del first  # a repeated step has the same values
    name = folder.path / "wandb" / "run-id.txt"
    if not name.exists():
        name.parent.mkdir(exist_ok=True)
        write_atomic(name, uuid.uuid4().hex)
    options = {"dir": folder.path, "name": folder.path.name, "config": dict(config)}
    try:
        run = needed("wandb")(**options, id=name.read_text(), resume="allow")
    except Exception as error:
        raise UserError(
            f"log_to: wandb does not start (got {type(error).__name__}: {error}). Log in with "
            "wandb login, or set WANDB_MODE=offline."
        ) from error
    with run:
        run.define_metric("*", step_metric="step")
        yield lambda line: run.log(numbers(line))
