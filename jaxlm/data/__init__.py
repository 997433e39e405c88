"""From text to batches: the data forms, see `DATA_FORMS`."""

from jaxlm.data.batching import EncodedTask, prepare, prepare_for
from jaxlm.data.encoding import Encoded
from jaxlm.data.forget import ForgetConfig, Forgetting
from jaxlm.data.messages import Conversation, Message, MessagesConfig
from jaxlm.data.pairs import Pair, Pairs, PairsConfig
from jaxlm.data.prompts import Prompted, prompted, with_demonstrations, without_examples
from jaxlm.data.readers import ParsedRow
from jaxlm.data.rows import EncodedRows, PaddedRows, TokenRow
from jaxlm.data.splits import Texts
from jaxlm.data.tasks import (
    Example,
    Task,
    TaskConfig,
    load_task,
    shipped_names,
    shipped_task,
    task_config,
    task_names,
)
from jaxlm.data.templates import Template
from jaxlm.data.text import Document, TextConfig
from jaxlm.data.tokens import Tagged, TokensConfig

DataConfig = TaskConfig | MessagesConfig | TextConfig | PairsConfig | TokensConfig | ForgetConfig
"""Configuration of a data form. `config.load(seed=0).encode(lm)` makes its batches."""

DATA_FORMS: dict[str, type[DataConfig]] = {
    "task": TaskConfig,
    "messages": MessagesConfig,
    "text": TextConfig,
    "pairs": PairsConfig,
    "tokens": TokensConfig,
    "forget": ForgetConfig,
}
"""The data forms by their keys in a configuration."""

__all__ = [
    "DATA_FORMS",
    "Conversation",
    "DataConfig",
    "Document",
    "Encoded",
    "EncodedRows",
    "EncodedTask",
    "Example",
    "ForgetConfig",
    "Forgetting",
    "Message",
    "MessagesConfig",
    "PaddedRows",
    "Pair",
    "Pairs",
    "PairsConfig",
    "ParsedRow",
    "Prompted",
    "Tagged",
    "Task",
    "TaskConfig",
    "Template",
    "TextConfig",
    "Texts",
    "TokenRow",
    "TokensConfig",
    "load_task",
    "prepare",
    "prepare_for",
    "prompted",
    "shipped_names",
    "shipped_task",
    "task_config",
    "task_names",
    "with_demonstrations",
    "without_examples",
]
