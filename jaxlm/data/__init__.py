"""From text to batches: the data forms `task`, `messages` and `text`."""

from jaxlm.data._prepare import prepare, prepare_for
from jaxlm.data._prompted import Prompted, prompted, with_demonstrations, without_examples
from jaxlm.data.batching import EncodedTask, collate
from jaxlm.data.encoding import Encoded, encode, encode_all
from jaxlm.data.examples import Example, Task, load_task
from jaxlm.data.messages import Conversation, Message, MessagesConfig, encode_messages
from jaxlm.data.opt_tasks import OPT_TASKS, OptTask
from jaxlm.data.roberta_tasks import ROBERTA_TASKS
from jaxlm.data.rows import EncodedData, EncodedRows, PaddedRows, TokenRow
from jaxlm.data.splits import Texts
from jaxlm.data.tasks import TaskConfig, shipped_names, shipped_task, task_config
from jaxlm.data.templates import Template
from jaxlm.data.text import Document, TextConfig, encode_documents

DataConfig = TaskConfig | MessagesConfig | TextConfig
"""Configuration of a data form: `load(seed=..., base_dir=...)` reads it, `encode(lm)` of what that
returns makes tokens, an `EncodedData`."""

DATA_FORMS: dict[str, type[DataConfig]] = {
    "task": TaskConfig,
    "messages": MessagesConfig,
    "text": TextConfig,
}
"""Data forms by the key that names them in a run's configuration."""

__all__ = [
    "DATA_FORMS",
    "OPT_TASKS",
    "ROBERTA_TASKS",
    "Conversation",
    "DataConfig",
    "Document",
    "Encoded",
    "EncodedData",
    "EncodedRows",
    "EncodedTask",
    "Example",
    "Message",
    "MessagesConfig",
    "OptTask",
    "PaddedRows",
    "Prompted",
    "Task",
    "TaskConfig",
    "Template",
    "TextConfig",
    "Texts",
    "TokenRow",
    "collate",
    "encode",
    "encode_all",
    "encode_documents",
    "encode_messages",
    "load_task",
    "prepare",
    "prepare_for",
    "prompted",
    "shipped_names",
    "shipped_task",
    "task_config",
    "with_demonstrations",
    "without_examples",
]
