"""The kinds of fine-tuning that a configuration may name.

`peft: {name: lora, rank: 4}` chooses a dataclass of `TUNINGS` and fills it.
"""

from dataclasses import dataclass
from typing import Literal

from jaxlm.core import checks
from jaxlm.core.errors import UserError
from jaxlm.models import LanguageModel
from jaxlm.models.adapters import LORA, PREFIX
from jaxlm.peft._lora import lora
from jaxlm.peft._prefix import prefix
from jaxlm.peft.bitfit import bitfit_selection
from jaxlm.peft.head import head_selection, untie
from jaxlm.typing import PRNGKey


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What every kind of fine-tuning has.

    Attributes:
        name: key in `TUNINGS`.
    """

    name: str

    def prepare(self, lm: LanguageModel, key: PRNGKey) -> LanguageModel:
        """The model with what is to be trained."""
        del key
        return lm

    def select(self, lm: LanguageModel) -> str:
        """The regular expression that selects what is to be trained of a prepared model."""
        raise TypeError(f"{type(self).__name__} selects nothing by itself")


@dataclass(frozen=True, kw_only=True)
class Lora(Tuning):
    """Low-rank adapters, `jaxlm.peft.lora`.

    Attributes:
        rank: of the adapters.
        alpha: they are multiplied by alpha / rank.
        targets: regular expression searched in the paths of kernels.
    """

    name: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    targets: str = r"attention\.(q|v)_proj"

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"peft.rank: must be at least 1 (got {self.rank}). Correct it.")
        if not 0 < self.alpha <= 1e30:
            raise UserError(
                f"peft.alpha: must be a finite number above 0 (got {self.alpha}). Correct it."
            )
        checks.regex("peft.targets", self.targets)

    def prepare(self, lm: LanguageModel, key: PRNGKey) -> LanguageModel:
        """See `Tuning`."""
        return lora(lm, key, rank=self.rank, alpha=self.alpha, targets=self.targets)

    def select(self, lm: LanguageModel) -> str:
        """See `Tuning`."""
        return LORA


@dataclass(frozen=True, kw_only=True)
class Prefix(Tuning):
    """Keys and values before those of the tokens, `jaxlm.peft.prefix`.

    Attributes:
        length: of the prefix.
        init: where it starts.
    """

    name: str = "prefix"
    length: int = 5
    init: Literal["activations", "normal"] = "activations"

    def __post_init__(self):
        if self.length < 1:
            raise UserError(f"peft.length: must be at least 1 (got {self.length}). Correct it.")

    def prepare(self, lm: LanguageModel, key: PRNGKey) -> LanguageModel:
        """See `Tuning`."""
        return prefix(lm, key, length=self.length, init=self.init)

    def select(self, lm: LanguageModel) -> str:
        """See `Tuning`."""
        return PREFIX


@dataclass(frozen=True, kw_only=True)
class BitFit(Tuning):
    """The biases alone."""

    name: str = "bitfit"

    def select(self, lm: LanguageModel) -> str:
        """See `Tuning`."""
        return bitfit_selection(lm)


@dataclass(frozen=True, kw_only=True)
class Head(Tuning):
    """The head alone.

    Attributes:
        untie: give a tied output embedding to the head first, so that the input keeps its own.
    """

    name: str = "head"
    untie: bool = False

    def prepare(self, lm: LanguageModel, key: PRNGKey) -> LanguageModel:
        """See `Tuning`."""
        return untie(lm) if self.untie else lm

    def select(self, lm: LanguageModel) -> str:
        """See `Tuning`."""
        return head_selection(lm)


TUNINGS: dict[str, type[Tuning]] = {
    "lora": Lora,
    "prefix": Prefix,
    "bitfit": BitFit,
    "head": Head,
}
