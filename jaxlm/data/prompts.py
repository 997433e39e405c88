"""Prompts as texts: what stands before an option, the options, and demonstrations before both."""

from dataclasses import dataclass, replace

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.tasks import Example, Task
from jaxlm.data.templates import Template

SEPARATOR = "\n\n"
"""What stands between demonstrations."""


@dataclass(frozen=True)
class Prompted:
    """An example as texts.

    Attributes:
        prompt: what is read, without spaces at its ends.
        options: what may follow the prompt, with the space between both.
        gold: the right options, the first of them the one to train on.
        answers: right texts, where a text is to be generated.
        id: where the example came from.
    """

    prompt: str
    options: tuple[str, ...]
    gold: tuple[int, ...]
    answers: tuple[str, ...]
    id: str

    @property
    def completed(self) -> str:
        """The prompt with the option to train on."""
        return self.prompt + self.options[self.gold[0]]


def prompted(task: Task, example: Example) -> Prompted:
    """An example of a task as prompt and options.

    >>> from jaxlm.data import Template, task_config
    >>> config = task_config({"name": "mine", "template": "{text} It was {label}.",
    ...                       "labels": ["bad", "good"]})
    >>> task = Task(config, Template.parse(config.template), (), (), ())
    >>> prompted(task, Example({"text": "A joy."}, 1, "a")).options
    (' bad.', ' good.')
    """
    words = example.options or task.config.labels
    rendered = [task.template.render(example.fields, word) for word in words]
    before = example.context + rendered[0].text[: rendered[0].label[0]]
    prompt = before.strip(" ")
    texts = [(example.context + each.text).strip(" ") for each in rendered]
    return Prompted(
        prompt,
        tuple(text[len(prompt) :] for text in texts),
        example.gold or (example.label,),
        example.answers,
        example.id,
    )


def with_demonstrations(task: Task, k: int, *, seed: int | None = None) -> Task:
    """Puts k solved training examples before every test example, for in-context learning.

    A demonstration is a prompt with its right option, without white space at its ends; blank lines
    separate them. What does not fit the model is cut on the left.

    Args:
        task: the task, with all the training examples that may be drawn.
        k: demonstrations of a test example.
        seed: of one draw for all test examples; None draws for every one of them, with a seed that
            `RandomState(0)` gives it, as MeZO's code does.

    Returns:
        The task with these test examples, and without training and validation examples.

    Raises:
        UserError: fewer than k training examples.
    """
    if not 1 <= k <= len(task.train):
        raise UserError(
            f"icl: task.train has {len(task.train)} examples to draw demonstrations from (got "
            f"{k}). Give a number from 1 to that."
        )
    count = len(task.test)
    drawn = np.random.RandomState(0).randint(0, 10000, count)
    seeds = drawn.tolist() if seed is None else [seed] * count
    solved = _Solved(task, {})
    test = tuple(
        replace(example, context=_joined([solved[i] for i in _places(each, len(task.train), k)]))
        for example, each in zip(task.test, seeds, strict=True)
    )
    config = replace(task.config, truncation="left")
    return replace(task, config=config, train=(), validation=(), test=test)


def _places(seed: int, count: int, k: int) -> list[int]:
    return np.random.RandomState(seed).permutation(count)[:k].tolist()


def _joined(texts: list[str]) -> str:
    return SEPARATOR.join([*texts, ""])


@dataclass(frozen=True)
class _Solved:
    """Training examples with their right options, each rendered once."""

    task: Task
    known: dict[int, str]

    def __getitem__(self, i: int) -> str:
        if i not in self.known:
            self.known[i] = prompted(self.task, self.task.train[i]).completed.strip()
        return self.known[i]


def without_examples(task: Task) -> Task:
    r"""The task with the prompts that calibrate its options: the template without the example.

    An option's score less its score here is $\log p(o \mid x) - \log p(o \mid \text{domain})$,
    summed over its tokens (arXiv:2104.08315). Demonstrations stay. The prompt is
    `TaskConfig.calibration`, or else what stands between the label word and the nearest fields.

    Raises:
        UserError: the task generates a text.
    """
    config = task.config
    if config.output == "text":
        raise UserError(
            f"calibrate: the task generates a text, so it has no options to calibrate (got "
            f"{config.name}). Leave it out."
        )
    template = task.template.bare
    if config.calibration is not None:
        template = Template.parse(config.calibration)
    return replace(task, config=replace(config, truncation="left"), template=template)
