"""From text to batches: tasks, templates, few-shot draws, tokens."""

from jaxlm.data._prepare import prepare, prepare_for
from jaxlm.data._prompted import Prompted, prompted, with_demonstrations, without_examples
from jaxlm.data.arrays import collate, collate_completions, collate_prompts
from jaxlm.data.batching import EncodedTask
from jaxlm.data.continuations import encode_prompted
from jaxlm.data.encoding import Encoded, encode, encode_all
from jaxlm.data.examples import Example, Task, load_task
from jaxlm.data.fewshot import draw_per_class, draw_split
from jaxlm.data.messages import (
    Conversation,
    EncodedMessages,
    Message,
    encode_messages,
    read_messages,
)
from jaxlm.data.opt_tasks import OPT_TASKS, OptTask
from jaxlm.data.roberta_tasks import ROBERTA_TASKS
from jaxlm.data.tasks import TaskConfig, shipped_names, shipped_task, task_config
from jaxlm.data.templates import Template

__all__ = [
    "OPT_TASKS",
    "ROBERTA_TASKS",
    "Conversation",
    "Encoded",
    "EncodedMessages",
    "EncodedTask",
    "Example",
    "Message",
    "OptTask",
    "Prompted",
    "Task",
    "TaskConfig",
    "Template",
    "collate",
    "collate_completions",
    "collate_prompts",
    "draw_per_class",
    "draw_split",
    "encode",
    "encode_all",
    "encode_messages",
    "encode_prompted",
    "load_task",
    "prepare",
    "prepare_for",
    "prompted",
    "read_messages",
    "shipped_names",
    "shipped_task",
    "task_config",
    "with_demonstrations",
    "without_examples",
]
