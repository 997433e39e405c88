"""Studies: questions that take many runs, each answered by a table and a picture.

A study is a module. It defines a frozen dataclass `Config` with the fields `study` (a class
variable, the study's name) and `output` (its folder), and two functions:

    outline(config, where, plan_flags) -> str            what a dry run prints
    run(config, folder, where, *, mesh, say) -> Result   the table, the text, the figures

Here `where` is the configuration file; relative paths of data start in its folder. A row of
`STUDIES` registers the study for `jaxlm study` and `jaxlm.studies.study.study`.
"""

from typing import Any, NamedTuple


class Study(NamedTuple):
    """A study's module, or the module's name if it is imported later, and its question."""

    module: Any
    question: str


STUDIES = {
    "bottleneck": Study(
        "jaxlm.studies.bottleneck",
        "whether a key-value bottleneck forgets a class of text, next to simpler methods",
    ),
    "curves": Study(
        "jaxlm.studies.curves",
        "how pretraining runs that differ in a few keys differ in their curves",
    ),
    "displacement": Study(
        "jaxlm.studies.displacement",
        "which preference pairs make training lower the chosen responses' likelihood",
    ),
    "kernel": Study("jaxlm.studies.kernel", "whether fine-tuning behaves like a kernel"),
    "less": Study(
        "jaxlm.studies.less",
        "which training data help a target task, by gradients and by other scores",
    ),
    "muse": Study(
        "jaxlm.studies.muse",
        "how well methods of unlearning forget, beside a model that never knew, and at what cost",
    ),
    "one_token": Study(
        "jaxlm.studies.one_token",
        "where the probability goes when a model learns to prefer one token to another",
    ),
    "ranking": Study(
        "jaxlm.studies.ranking",
        "how well a model ranks preference pairs, could rank them, and which ones training flips",
    ),
}
"""The studies by name."""
