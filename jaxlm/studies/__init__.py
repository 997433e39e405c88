"""Studies: questions that take many runs, each answered by a table and a picture.

A study is a module with a configuration `Config` whose attribute `study` is its name, and

    outline(config, where) -> str              what a dry run prints
    run(config, folder, where, *, mesh, say) -> Result

where `where` is the configuration's file, beside which relative paths of data start.
"""

STUDIES = {
    "curves": "pretraining runs that differ in a few keys, compared by their curves",
    "kernel": "whether fine-tuning behaves like a kernel",
    "less": "which training data help a target task, chosen by gradients and by other scores",
}
"""Name of a study, which is that of its module, and what it asks."""
