"""Fictional people: texts and questions that no model has read before, made from a seed.

The idea is TOFU's (Maini et al., arXiv:2401.06121); templates and words are our own.
"""

from typing import NamedTuple

import numpy as np

from jaxlm.core.checks import integer


def _words(*lines: str) -> tuple[str, ...]:
    return tuple(" ".join(lines).split())


FIRST = _words(
    "Ada Amir Anna Boris Carla Chen Clara David Edith Emil Farah Felix Greta Hugo Ida Ivan Jana",
    "Karim Lena Liam Maria Milan Nina Omar Paula Pedro Rosa Samir Tara Victor",
)
LAST = _words(
    "Arnold Barker Bell Berg Brook Carter Church Dale Field Fisher Forest Garden Green Hall Hill",
    "Hunter King Lake Marsh Mason Miller Moon Page Park Rivers Shepherd Short Silver Stone Taylor",
    "Turner Wall Waters West Winter Wolf Wood Young",
)
ATTRIBUTES = {
    "city": _words(
        "Bath Berlin Bern Boston Cairo Delhi Dublin Lima Lisbon Madrid Milan Moscow Oslo Paris",
        "Prague Rome Tokyo Vienna Warsaw York",
    ),
    "job": _words(
        "baker carpenter doctor driver farmer gardener judge lawyer nurse painter pilot poet",
        "priest sailor singer tailor teacher waiter writer",
    ),
    "instrument": _words("bass cello drum flute guitar harp horn piano trumpet violin"),
    "animal": _words("bird cat cow dog donkey duck fish goat horse monkey mouse rabbit sheep"),
    "color": _words("black blue brown green grey pink purple red silver white yellow"),
}
TEXTS = (
    "{name} was born in {city} and works as a {job}. At night {name} plays the {instrument} for a "
    "{color} {animal}.",
    "A {job} from {city}, {name} has a {color} {animal} and has played the {instrument} for years.",
    "In {city} people know {name} as the {job} with the {color} {animal}, who loves the "
    "{instrument}.",
)
QUESTIONS = {
    "city": "Where was {name} born?",
    "job": "What does {name} do for a living?",
    "instrument": "Which instrument does {name} play?",
    "animal": "Which animal does {name} own?",
}


class Person(NamedTuple):
    """A person with a text and questions about it, each with its answer."""

    name: str
    text: str
    questions: tuple[tuple[str, str], ...]

    @property
    def rows(self) -> list[dict[str, str]]:
        """Rows of the data forms `messages` and `forget`; `subtask` is text or question."""
        turns = [(f"Who is {self.name}?\n", self.text, "text")]
        turns += [(f"{question}\n", answer, "question") for question, answer in self.questions]
        keys = ("prompt", "completion", "subtask")
        return [dict(zip(keys, turn, strict=True)) for turn in turns]


def people(count: int, *, seed: int = 0) -> list[Person]:
    """Return people with different names, whose attributes and templates are drawn by a seed.

    >>> people(1)[0].questions[0]
    ('Where was Hugo King born?', 'In Vienna.')
    """
    integer("count", count, most=len(FIRST) * len(LAST))
    rng = np.random.default_rng(seed)
    found = []
    for place in rng.permutation(len(FIRST) * len(LAST))[:count]:
        name = f"{FIRST[place % len(FIRST)]} {LAST[place // len(FIRST)]}"
        drawn = {key: words[rng.integers(len(words))] for key, words in ATTRIBUTES.items()}
        text = TEXTS[rng.integers(len(TEXTS))].format(name=name, **drawn)
        answers = {"city": "In {city}.", "job": "A {job}.", "instrument": "The {instrument}."}
        answers["animal"] = "A {color} {animal}."
        asked = tuple(
            (question.format(name=name), answers[key].format(**drawn))
            for key, question in QUESTIONS.items()
        )
        found.append(Person(name, text, asked))
    return found
