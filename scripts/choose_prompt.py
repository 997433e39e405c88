"""Compare the prompts of a two-class task on its training text.

usage: python scripts/choose_prompt.py configs/prompts/mr.yaml [--model FOLDER] [--sentences 2000]

Each template is run over training sentences. Each pair of label words predicts by the difference
of their logits, and gets two accuracies: raw (threshold 0), and calibrated (threshold at the median
difference). Prompts are sorted by the second. No validation or test sentence is read.
"""

import argparse
import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np
import yaml

import jaxlm
from jaxlm.data import load_task, prepare_for, task_config
from jaxlm.evaluation import accuracy, calibrate, option_scores, score_split


def single_tokens(tokenizer: Any, words: list[str]) -> list[str]:
    """Return the words that are one token after a space."""
    return [word for word in words if len(tokenizer.tokenize(" " + word)) == 1]


def compare(lm: jaxlm.models.LanguageModel, choices: dict[str, Any], sentences: int) -> list[Any]:
    """Return (calibrated accuracy, raw accuracy, template, words) per prompt, best first."""
    first, second = (single_tokens(lm.tokenizer, words) for words in choices["words"])
    rows = []
    for template in choices["templates"]:
        config = {"name": choices["task"], "template": template, "labels": [*first, *second]}
        task = load_task(task_config(config), seed=0)
        part = dataclasses.replace(task, train=task.train[:sentences], validation=(), test=())
        encoded = prepare_for(lm, part)
        score = functools.partial(option_scores, log_probs=lm.continuation_log_probs)
        scorer = jax.jit(functools.partial(score, lm.apply, encoded.token_ids))
        scores, labels = score_split(scorer, lm.params, encoded, "train", batch_size=50)
        for i, j in itertools.product(range(len(first)), range(len(second))):
            pair = scores[:, [i, len(first) + j]]
            rates = accuracy(calibrate(pair, pair), labels), accuracy(pair, labels)
            rows.append((*rates, template, f"{first[i]}, {second[j]}"))
    return sorted(rows, reverse=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("choices")
    parser.add_argument("--model")
    parser.add_argument("--sentences", type=int, default=2000)
    parser.add_argument("--show", type=int, default=15)
    options = parser.parse_args()
    with open(options.choices) as file:
        choices = yaml.safe_load(file)
    rows = compare(jaxlm.from_pretrained(options.model), choices, options.sentences)
    print("calibrated  raw    prompt")
    for calibrated, raw, template, words in rows[: options.show]:
        print(f"{calibrated:10.3f}  {raw:.3f}  {template} [{words}]")
    print(f"mean of {len(rows)} prompts: {np.mean([row[0] for row in rows]):.3f} calibrated")


if __name__ == "__main__":
    main()
