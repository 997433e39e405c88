"""Run a study from its configuration."""

import importlib
from typing import Any

from jax.sharding import Mesh

from jaxlm.studies import STUDIES
from jaxlm.studies.grid import Result, Say, study_folder
from jaxlm.studies.tables import write_tables


def module_of(name: str) -> Any:
    """Return the module of a study, or of the sweep."""
    module = "jaxlm.studies.sweep" if name == "sweep" else STUDIES[name].module
    return importlib.import_module(module) if isinstance(module, str) else module


def study(
    config: Any, *, where: str = ".", mesh: Mesh | None = None, say: Say = lambda line: None
) -> Result:
    """Run a study in its folder, or resume it, and write its tables and figures.

    Relative paths of data start in the folder of `where`, the configuration file, which errors
    name. `say` is called with each line of progress.
    """
    with study_folder(config.study, config) as folder:
        result: Result = module_of(config.study).run(config, folder, where, mesh=mesh, say=say)
        write_tables(folder, result.table, result.text)
    return result
