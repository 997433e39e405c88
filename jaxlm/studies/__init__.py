"""Studies: questions that take many runs, each answered by a table and a picture.

A study is a module with a frozen dataclass `Config`, which has the fields `study` (a class
variable, the study's name) and `output` (its folder), and two functions:

    outline(config, where, plan_flags) -> str            what a dry run prints
    run(config, folder, where, *, mesh, say) -> Result   the table, the text, the figures

where `where` is the configuration's file, beside which relative paths of data start. A row of
`STUDIES` makes it known to `jaxlm study` and to `jaxlm.studies.study.study`.
"""

from typing import Any, NamedTuple


class Study(NamedTuple):
    """A study's module, or the name of one that is not imported yet, and what it asks."""

    module: Any
    question: str


STUDIES = {
    "curves": Study(
        "jaxlm.studies.curves",
        "how pretraining runs that differ in a few keys differ in their curves",
    ),
    "kernel": Study("jaxlm.studies.kernel", "whether fine-tuning behaves like a kernel"),
    "less": Study(
        "jaxlm.studies.less",
        "which training data help a target task, chosen by gradients and by other scores",
    ),
}
"""The studies by name."""
