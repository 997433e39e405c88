"""The fifteen few-shot tasks of LM-BFF on which MeZO tunes RoBERTa.

Templates, label words and limits are those of Malladi et al. (arXiv:2305.17333), who take them from
LM-BFF (Gao et al., arXiv:2012.15723); STS-B, which they leave out, is LM-BFF's own.
"""

from collections.abc import Mapping
from typing import Any

SEEDS = (13, 21, 42, 87, 100)
"""Seeds of the draws of k examples a class."""

_IT_WAS = "*cls**sent_0*_It_was*mask*.*sep+*"
_THIS_IS = "*cls**sent_0*_This_is*mask*.*sep+*"
_PAIR = "*cls**sent_0**mask*,*+sentl_1**sep+*"
_QUESTION = "*cls**sent-_0*?*mask*,*+sentl_1**sep+*"
_SENTIMENT = ("terrible", "great")
_NLI = ("No", "Yes", "Maybe")  # contradiction, entailment, neutral
_GLUE_NLI = (2, 0, 1)  # how GLUE and SNLI number them


def _task(
    source: str | None,
    test: str,
    fields: str,
    template: str,
    labels: tuple[str, ...],
    **values: Any,
) -> Mapping[str, Any]:
    return {
        "train": None if source is None else f"{source}:train",
        "validation": "hold_out",
        "test": None if source is None else f"{source}:{test}",
        "fields": tuple(fields.split()),
        "template": template,
        "labels": labels,
        "k": 16,
        "num_test": 1000,
        "test_seed": 42,
        "max_length": 128,
        **values,
    }


ROBERTA_TASKS: Mapping[str, Mapping[str, Any]] = {
    "sst-2": _task("nyu-mll/glue/sst2", "validation", "sentence", _IT_WAS, _SENTIMENT),
    "sst-5": _task(
        "SetFit/sst5",
        "test",
        "text",
        _IT_WAS,
        ("terrible", "bad", "okay", "good", "great"),
        first_field_limit=110,
    ),
    "mr": _task(
        "cornell-movie-review-data/rotten_tomatoes",
        "test",
        "text",
        _IT_WAS,
        _SENTIMENT,
        first_field_limit=110,
    ),
    "cr": _task("SetFit/SentEval-CR", "test", "text", _IT_WAS, _SENTIMENT, first_field_limit=110),
    "mpqa": _task(None, "test", "text", _IT_WAS, _SENTIMENT, first_field_limit=110),
    "subj": _task(
        "SetFit/subj",
        "test",
        "text",
        _THIS_IS,
        ("subjective", "objective"),
        label_field="label_text",
        first_field_limit=110,
    ),
    "trec": _task(
        "CogComp/trec",
        "test",
        "text",
        "*cls**mask*:*+sent_0**sep+*",
        ("Description", "Entity", "Expression", "Human", "Location", "Number"),
        label_field="coarse_label",
        classes=(2, 1, 0, 3, 4, 5),
        first_field_limit=110,
    ),
    "cola": _task(
        "nyu-mll/glue/cola", "validation", "sentence", _THIS_IS, ("incorrect", "correct")
    ),
    "mnli": _task(
        "nyu-mll/glue/mnli",
        "validation_matched",
        "premise hypothesis",
        _QUESTION,
        _NLI,
        classes=_GLUE_NLI,
        max_length=256,
        first_field_limit=240,
    ),
    "snli": _task(
        "stanfordnlp/snli",
        "test",
        "premise hypothesis",
        _QUESTION,
        _NLI,
        classes=_GLUE_NLI,
        max_length=256,
    ),
    "rte": _task(
        "nyu-mll/glue/rte",
        "validation",
        "sentence1 sentence2",
        _QUESTION,
        ("Yes", "No"),
        max_length=256,
        first_field_limit=240,
    ),
    "qnli": _task("nyu-mll/glue/qnli", "validation", "question sentence", _QUESTION, ("Yes", "No")),
    "qqp": _task("nyu-mll/glue/qqp", "validation", "question1 question2", _PAIR, ("No", "Yes")),
    "mrpc": _task("nyu-mll/glue/mrpc", "validation", "sentence1 sentence2", _PAIR, ("No", "Yes")),
    "sts-b": _task(
        "nyu-mll/glue/stsb",
        "validation",
        "sentence1 sentence2",
        _PAIR,
        ("No", "Yes"),
        threshold=2.5,
    ),
}
"""Keys of each task's configuration; `roberta/NAME` is its name there."""
