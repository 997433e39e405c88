"""Prompts as texts: the text before an option, the options, and demonstrations before both."""

import functools
from dataclasses import dataclass, replace

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.tasks import Example, Task
from jaxlm.data.templates import Template

SEPARATOR = "\n\n"
"""Between two demonstrations."""


@dataclass(frozen=True)
class Prompted:
    """An example as texts.

    Attributes:
        prompt: text before the option, without spaces at its ends.
        options: what may follow the prompt, including the space between them.
        gold: the right options; the first of them is trained on.
        answers: right texts, if a text is generated.
        id: source and number of the example's row.
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
    """Return an example of a task as prompt and options.

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
    """Put k solved training examples before every test example, for in-context learning.

    A demonstration is a prompt with its right option, without white space at its ends; blank lines
    separate them. Texts too long for the model are cut on the left.

    Args:
        task: the task, with all the training examples that may be drawn.
        k: number of demonstrations before a test example.
        seed: seed of one draw for all test examples. With None, each test example has its own draw,
            whose seed comes from `RandomState(0)`, as in MeZO's code.

    Returns:
        The task with these test examples, and no others.

    Raises:
        UserError: there are fewer than k training examples.
    """
    if not 1 <= k <= len(task.train):
        raise UserError(
            f"icl: task.train has {len(task.train)} examples to draw demonstrations from (got "
            f"{k}). Give a number between 1 and that."
        )
    count = len(task.test)
    each = np.random.RandomState(0).randint(0, 10000, count).tolist()
    seeds = each if seed is None else [seed] * count

    # Cached: with 1,000 test examples, the same demonstrations are drawn many times.
    @functools.cache
    def solved(place: int) -> str:
        return prompted(task, task.train[place]).completed.strip()

    def context(seed: int) -> str:
        places = np.random.RandomState(seed).permutation(len(task.train))[:k]
        return SEPARATOR.join([*map(solved, places.tolist()), ""])

    test = tuple(
        replace(example, context=context(each))
        for example, each in zip(task.test, seeds, strict=True)
    )
    config = replace(task.config, truncation="left")
    return replace(task, config=config, train=(), validation=(), test=test)


def without_examples(task: Task) -> Task:
    r"""Return the task with prompts for domain calibration: the template without the example.

    An option's score minus its score here is $\log p(o \mid x) - \log p(o \mid \text{domain})$,
    summed over its tokens (arXiv:2104.08315). Demonstrations stay. The prompt is
    `TaskConfig.calibration`, or else the text between the label word and the nearest fields.

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
