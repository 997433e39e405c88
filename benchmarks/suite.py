"""The benchmarks that `python -m benchmarks.all` runs, in its order, and the headline of each."""

from typing import NamedTuple

from benchmarks.results import Figure


class Benchmark(NamedTuple):
    """A benchmark file of this folder.

    Attributes:
      figures: its headline.
      needs: packages that it cannot run without.
      full: extra arguments without --quick; {output} is the folder of the results.
    """

    figures: tuple[Figure, ...]
    needs: tuple[str, ...] = ()
    full: tuple[str, ...] = ()


STEPS = "MeZO|LOZO|FZOO|Muon|Adam"
OURS = "^(?!.*(torch|two|back))"
ACCURACIES = "zero_shot|calibrated|mezo$|lozo|fzoo|adam"
PEERS = "(jacobian|jacrev|LM-).*C=1"

SUITE = {
    "mezo_step": Benchmark(
        (
            Figure("time over as many forwards", "over_forwards", "shape method", STEPS),
            Figure("peak memory over a forward's", "over_forward_peak", "shape method", STEPS),
            Figure("time of the authors' step over it", "torch_over_it", "shape method", OURS),
        )
    ),
    "mezo_memory": Benchmark(
        (Figure("peak memory over a forward's", "over_forward", "shape method", STEPS),)
    ),
    "mezo_accuracy": Benchmark(
        (Figure("test accuracy, per cent", "accuracy", "task method", ACCURACIES),),
        full=("--output", "{output}/mezo_accuracy"),
    ),
    "effect": Benchmark((Figure("points of accuracy that MeZO gains over", "gains", "task"),)),
    "estimator_quality": Benchmark(
        (
            Figure("cosine over theory's", "cosine_over_expected", "checkpoint layer", "all$"),
            Figure("error of slopes", "slope_error", "checkpoint layer", "all$"),
            Figure("effective rank of the Hessian", "rank", "checkpoint"),
        )
    ),
    "scaling": Benchmark(
        (
            Figure("MB that a device sends in a step", "moved_MB", "method mesh", "=8"),
            Figure("peak memory over one device's", "peak_over_one", "method mesh", "=8"),
        )
    ),
    "dry_run": Benchmark(
        (Figure("predicted memory of training over measured", "training_ratio", "run"),)
    ),
    "models": Benchmark(
        (Figure("time over transformers'", "ratio", "what shape"),), needs=("torch",)
    ),
    "dpo_step": Benchmark((Figure("time over TRL's", "ratio", "prompt"),), needs=("torch", "trl")),
    "sft_step": Benchmark((Figure("time over TRL's", "ratio", "loss_on"),), needs=("torch", "trl")),
    "ntk": Benchmark(
        (
            Figure("time over ours", "times", "method T C", PEERS),
            Figure("error in bfloat16", "frobenius", "kind"),
        )
    ),
    "influence": Benchmark(
        (Figure("times as fast as the authors' loop", "times", "features", "^(?!torch|batch)"),)
    ),
    "projection": Benchmark(
        (Figure("times as fast as BasicProjector", "times", "projection P", "^(?!Basic)"),)
    ),
    "scoring": Benchmark(
        (
            Figure("seconds to score a store", "again_s", "dtype"),
            Figure("seconds to select", "seconds", "method"),
        )
    ),
    "lds": Benchmark(
        (
            Figure("linear datamodelling score", "score", "attribution"),
            Figure("with answers balanced", "balanced", "attribution"),
        )
    ),
    "topics": Benchmark(
        (
            Figure(
                "times as fast as retraining", "times", "words documents forgotten which", "random"
            ),
            Figure("distance from it", "unlearned", "words documents forgotten which"),
        )
    ),
    "dynamics": Benchmark(
        (
            Figure("time over ours", "over_jaxlm", "implementation", "numpy|torch"),
            Figure("time over the joint batch's", "over_joint", "steps", "H =|SVAG"),
        )
    ),
}
