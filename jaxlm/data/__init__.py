"""From text to batches: tasks, templates, few-shot draws, tokens."""

from jaxlm.data.batching import EncodedTask, collate, prepare, prepare_for
from jaxlm.data.encoding import Encoded, encode, encode_all
from jaxlm.data.examples import Example, Task, load_task
from jaxlm.data.fewshot import draw_per_class
from jaxlm.data.tasks import TaskConfig, shipped_names, shipped_task, task_config
from jaxlm.data.templates import Template

__all__ = [
    "Encoded",
    "EncodedTask",
    "Example",
    "Task",
    "TaskConfig",
    "Template",
    "collate",
    "draw_per_class",
    "encode",
    "encode_all",
    "load_task",
    "prepare",
    "prepare_for",
    "shipped_names",
    "shipped_task",
    "task_config",
]
