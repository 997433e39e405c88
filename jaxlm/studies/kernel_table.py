"""The criteria of kernel behaviour, and tables of reports in Markdown."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxlm.kernels.behaviour import linearization_score
from jaxlm.studies.tables import aligned, percent, spread

WITHIN = 0.10
"""A kernel solves a task if its accuracy is at most this far below that of fine-tuning."""

RECOVERED = 0.5
"""Fine-tuning is linear if its linearization recovers more than this share of the improvement."""

OVERSHOT = 1.5
"""Above this share of the improvement, the linearization no longer describes training."""

SIGNIFICANT = 0.05
"""Kernel behaviour is judged only if the p-value of the gain is below this."""

FLOOR = 0.5
"""Kernel and linearization must beat their nulls by more than this share of the gain, and the
kernel must move less than this share of the way to random features."""

CHANGE = 2.0
"""Features are fixed if the mean relative change of the kernel is below this."""

NAMES = {"sgd": "K-SGD", "signgd": "K-SignGD", "asymmetric_signgd": "K-A-SignGD"}

ACCURACIES = (
    "task", "k", "prompt", "optimizer", "majority", "zero-shot", "fine-tuned", "linearized",
)  # fmt: skip
VERDICTS = (
    "task", "k", "prompt", "optimizer", "kernel", "p of the gain", "below fine-tuning",
    "over its null", "recovered", "by chance", "relative change", "to random", "solves", "linear",
    "fixed", "kernel behaviour", "by the paper",
)  # fmt: skip


class Verdict(NamedTuple):
    """The criteria for one kernel; None if the gain of fine-tuning over zero-shot may be chance.

    Attributes:
        solves: its accuracy is at most `WITHIN` below fine-tuning's, and clearly above its null's.
        linear: the linearization recovers more than `RECOVERED` of the improvement and no more than
            `OVERSHOT`, and more than a random move of the parameters does.
        fixed: the kernel's mean relative change is below `CHANGE`, and below `FLOOR` times its
            change to random features.
    """

    solves: bool | None
    linear: bool | None
    fixed: bool

    @property
    def kernel_behaviour(self) -> bool | None:
        """Whether all three hold; None if they cannot be judged."""
        if self.solves is None or self.linear is None:
            return None
        return self.solves and self.linear and self.fixed


class Nulls(NamedTuple):
    """The values that the criteria are compared with.

    Attributes:
        gain_p: see `Report`.
        kernel: test accuracy of the null of a kernel, see `KernelResult`.
        linearized: test accuracy after a random move, see `Report`.
        change: mean relative change to random features.
    """

    gain_p: float
    kernel: float
    linearized: float
    change: float


def verdict(
    zero_shot: float,
    fine_tuned: float,
    linearized: float,
    kernel: float,
    change: float,
    nulls: Nulls | None = None,
) -> Verdict:
    """Judge the three criteria by test accuracies and the kernel's mean relative change.

    Args:
        zero_shot, fine_tuned, linearized, kernel, change: of a report and a kernel.
        nulls: values to compare with; None for the paper's own definition.

    >>> verdict(0.5, 0.9, 0.75, 0.82, 0.3)
    Verdict(solves=True, linear=True, fixed=True)
    >>> verdict(0.9, 0.9, 0.9, 0.9, 3.0)
    Verdict(solves=None, linear=None, fixed=False)
    """
    recovered = linearization_score(zero_shot, fine_tuned, linearized)
    fixed = change < CHANGE
    if nulls is not None:
        fixed = fixed and change < FLOOR * nulls.change
    if recovered is None or (nulls is not None and nulls.gain_p >= SIGNIFICANT):
        return Verdict(None, None, fixed)
    solves = fine_tuned - kernel <= WITHIN + 1e-9
    linear = recovered > RECOVERED
    if nulls is not None:
        floor = FLOOR * (fine_tuned - zero_shot)
        solves = solves and kernel - nulls.kernel > floor
        linear = linear and recovered <= OVERSHOT and linearized - nulls.linearized > floor
    return Verdict(solves, linear, fixed)


def rows(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per task, k, prompt and optimizer, over the seeds.

    Args:
        records: as `jaxlm.studies.kernel_behaviour.record` returns them.

    Returns:
        Dicts with the key, `seeds`, and {mean, std, by_seed} of each accuracy; under `kernels` the
        same of each kind, with the verdict on the means over seeds.
    """
    keys = list(dict.fromkeys(_key(each) for each in records))
    return [_row(key, [each for each in records if _key(each) == key]) for key in keys]


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """Return two tables: accuracies as in the paper, and the criteria.

    Args:
        records: see `rows`.
    """
    found = rows(records)
    kinds = list(dict.fromkeys(kind for row in found for kind in row["kernels"]))
    seeds = ", ".join(map(str, dict.fromkeys(each["seed"] for each in records)))
    accuracies = [_accuracies(row, kinds) for row in found]
    verdicts = [_verdict(row, kind) for row in found for kind in row["kernels"]]
    return (
        "\n\n".join(
            [
                f"Test accuracy in per cent, mean (standard deviation) over the seeds {seeds}; "
                "zero-shot without a prompt is the linear head that training starts from.",
                aligned((*ACCURACIES, *(NAMES.get(kind, kind) for kind in kinds)), accuracies),
                "Judged on the means. The paper's criteria (last column): the kernel is within "
                f"{100 * WITHIN:.0f} points of fine-tuning, the linearization recovers more than "
                f"{100 * RECOVERED:.0f} % of the improvement, and the kernel changes by less than "
                f"{CHANGE:g} times its size. The others also need a significant gain (median p "
                f"below {SIGNIFICANT:g}, McNemar's exact test), or are left empty; kernel and "
                f"linearization must beat their nulls (permuted labels; a random move of the "
                f"same length) by {100 * FLOOR:.0f} % of the gain, the linearization recovers at "
                f"most {100 * OVERSHOT:.0f} %, and the kernel changes by less than "
                f"{100 * FLOOR:.0f} % of its change to random features.",
                aligned(VERDICTS, verdicts),
            ]
        )
        + "\n"
    )


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["task"], len(record["train_labels"]), record["prompt"], record["optimizer"]


def _row(key: tuple[Any, ...], records: list[dict[str, Any]]) -> dict[str, Any]:
    task, num_train, prompt, optimizer = key
    names = ("majority", "zero_shot", "fine_tuned", "linearized", "null_linearized")
    row: dict[str, Any] = {
        "task": task,
        "num_train": num_train,
        "k": records[0]["k"],
        "prompt": prompt,
        "optimizer": optimizer,
        "seeds": [each["seed"] for each in records],
        **{name: spread([each[name] for each in records]) for name in names},
        "gain_p": statistics.median(each["gain_p"] for each in records),
    }
    kinds = [kernel["kind"] for kernel in records[0]["kernels"]]
    row["kernels"] = {kind: _kernel(row, kind, records) for kind in kinds}
    return row


def _kernel(row: dict[str, Any], kind: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    found = [next(k for k in each["kernels"] if k["kind"] == kind) for each in records]
    test = spread([each["test"] for each in found])
    change = {
        name: spread([float(each["change"][name]) for each in found])
        for name in ("mean", "median", "frobenius", "alignment")
    }
    names = ("zero_shot", "fine_tuned", "linearized")
    first, final, linear = (row[name]["mean"] for name in names)
    null = spread([each["null"] for each in found])
    control = spread([float(each["control"]["mean"]) for each in found])
    numbers = (first, final, linear, test["mean"], change["mean"]["mean"])
    nulls = Nulls(row["gain_p"], null["mean"], row["null_linearized"]["mean"], control["mean"])
    judged = verdict(*numbers, nulls)
    return {
        "test": test,
        "validation": spread([each["validation"] for each in found]),
        "settings": [each["settings"] for each in found],
        "change": change,
        "null": null,
        "control": control,
        "below": final - test["mean"],
        "recovered": linearization_score(first, final, linear),
        "by_chance": linearization_score(first, final, nulls.linearized),
        "verdict": {**judged._asdict(), "kernel_behaviour": judged.kernel_behaviour},
        "paper": verdict(*numbers).kernel_behaviour,
    }


def _place(row: dict[str, Any]) -> list[str]:
    shots = row["k"] if row["k"] is not None else row["num_train"]
    return [row["task"], str(shots), _yes(row["prompt"]), row["optimizer"]]


def _accuracies(row: dict[str, Any], kinds: list[str]) -> list[str]:
    names = ("majority", "zero_shot", "fine_tuned", "linearized")
    kernels = [row["kernels"].get(kind, {}).get("test") for kind in kinds]
    return [*_place(row), *(percent(row[name]) for name in names), *map(percent, kernels)]


def _verdict(row: dict[str, Any], kind: str) -> list[str]:
    kernel = row["kernels"][kind]
    recovered, chance, judged = (kernel[name] for name in ("recovered", "by_chance", "verdict"))
    return [
        *_place(row),
        NAMES.get(kind, kind),
        f"{row['gain_p']:.2g}",
        f"{100 * kernel['below']:.1f}",
        f"{100 * (kernel['test']['mean'] - kernel['null']['mean']):.1f}",
        *("" if share is None else f"{100 * share:.0f} %" for share in (recovered, chance)),
        f"{kernel['change']['mean']['mean']:.2f}",
        f"{kernel['control']['mean']:.2f}",
        *(_yes(judged[name]) for name in ("solves", "linear", "fixed", "kernel_behaviour")),
        _yes(kernel["paper"]),
    ]


def _yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"
