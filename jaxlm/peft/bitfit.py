"""BitFit: only the biases are trained.

References: Ben Zaken et al., arXiv:2106.10199.
"""

from jaxlm.core.errors import UserError
from jaxlm.core.paths import path_predicate
from jaxlm.models import LanguageModel
from jaxlm.models.initialise import unnest

BITFIT = r"\.bias$"


def bitfit_selection(lm: LanguageModel) -> str:
    """`BITFIT`, for a model that has biases.

    Raises:
      UserError: for one that has none, such as most Llamas.
    """
    if not any(map(path_predicate(BITFIT), unnest(lm.params))):
        raise UserError(
            f"peft: a {lm.config.family} model has no biases to train. Take lora or head."
        )
    return BITFIT
