"""jaxlm: fine-tune and study language models, in JAX.

    import jaxlm
    from jaxlm import zo

    lm = jaxlm.from_pretrained("path-or-hub-id")
    run = jaxlm.finetune(model="path-or-hub-id", task="subj", optimizer="mezo")

Submodules are imported on first access, so that `import jaxlm` costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlm import (
        artifacts,
        core,
        cost,
        data,
        dynamics,
        evaluation,
        gradients,
        influence,
        kernels,
        models,
        peft,
        preference,
        sharding,
        studies,
        topics,
        train,
        unlearning,
        zo,
    )
    from jaxlm.cli.evaluate import evaluate
    from jaxlm.cli.finetune import finetune
    from jaxlm.cli.generate import generate
    from jaxlm.cli.predict import predict
    from jaxlm.cli.pretrain import pretrain
    from jaxlm.cli.study import study
    from jaxlm.core.citation import cite
    from jaxlm.models import save_pretrained
    from jaxlm.train.load import from_pretrained

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "artifacts",
    "cite",
    "core",
    "cost",
    "data",
    "dynamics",
    "evaluate",
    "evaluation",
    "finetune",
    "from_pretrained",
    "generate",
    "gradients",
    "influence",
    "kernels",
    "models",
    "peft",
    "predict",
    "preference",
    "pretrain",
    "save_pretrained",
    "sharding",
    "studies",
    "study",
    "topics",
    "train",
    "unlearning",
    "zo",
]

_FUNCTIONS = {
    "cite": "jaxlm.core.citation",
    **{
        name: f"jaxlm.cli.{name}"
        for name in ("evaluate", "finetune", "generate", "predict", "pretrain", "study")
    },
    "from_pretrained": "jaxlm.train.load",
    "save_pretrained": "jaxlm.models",
}


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        value = getattr(importlib.import_module(_FUNCTIONS[name]), name)
        globals()[name] = value
        return value
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
