"""How long does the kernel of a language model take, and how much memory?

usage: python -m benchmarks.ntk [--quick] [--repeats 5] [--no-torch] [--scaling] [--roberta-base]

A masked model of 4 layers of width 256 with 2000 tokens, float32, random weights; f is the logits
of three label words at one position, or for C = 1 the difference of two; 32 examples against 64,
without padding. There is one table for each length and C, in which the methods take turns:

  factorized                the backward pass computes the kernel layer by layer; contractions by
                            the cost model
  factorized, paired        the same, matrices always by products of factors, tables by matches
  factorized, chunked       the same, always by chunks of gradients
  jacobian contraction      all gradients in JAX, then contracted
  torch.func, jacrev        the same in PyTorch, as in its tutorial
  torch.func, vjp and jvp   the tutorial's other way, pair by pair; timed on one row of the kernel
  LM-Kernel-FT, 64          its authors' way with 64 examples in a jvp, which their flag allows
  LM-Kernel-FT, 1           the same with one example in a jvp; both totals are extrapolated from
                            some jvps, since all of them take minutes

  times                     time over that of factorized
  peak_MB                   by the compiler
  resident_MB               increase of the peak memory of a fresh process
  difference                largest |K - K'| over largest |K'|, K' by torch.func (else the Jacobian)

The first table has the seconds of `kernels.ntk` for 32 examples against 64 of 16 tokens: the first
call, which compiles, and the second. A further table has both contractions for the kernel of one
matrix or table, for each length and C: their seconds, the chosen one, and its time over that of the
faster; the constants of `jaxlm.kernels.cost` come from it. --scaling adds how time grows with N, T
and P; --roberta-base adds 32 examples of 32 tokens against 936 at that model's size. The last table
has the error of kernels with parameters and activations in bfloat16, against float32: the largest,
as `difference` above, and in the Frobenius norm. --quick uses 2 layers, 8 examples of 16 tokens
against 16, C = 1 only, and one kind in the first and last table. The last line is one JSON object.
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.shapes import ROBERTA_BASE
from jaxlm import kernels
from jaxlm.kernels import KernelOptions, cost, leaf_kernels
from jaxlm.kernels.leaf_kernels import Pairing
from jaxlm.models import LanguageModel, ModelConfig, init_params
from jaxlm.studies.kernel_task import label_difference, label_logits

SMALL = ROBERTA_BASE.replace(
    vocab_size=2000,
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    intermediate_size=1024,
    embedding_size=256,
)
WORDS = (11, 12, 13)
COUNTS = (32, 64)
UNCHECKED = KernelOptions(check=False)
JVPS = 16
KINDS = ("sgd", "signgd", "asymmetric_signgd")
QUICK_COUNTS, QUICK_JVPS, QUICK_CONFIG = (8, 16), 2, SMALL.replace(num_layers=2)


def examples(config: ModelConfig, count: int, length: int, seed: int) -> dict[str, np.ndarray]:
    """Draw random rows without padding, in each of which one position is scored."""
    rng = np.random.default_rng(seed)
    return {
        "input_ids": rng.integers(20, config.vocab_size, (count, length), np.int32),
        "attention_mask": np.ones((count, length), np.int32),
        "positions": rng.integers(1, length - 1, count, np.int32),
    }


def outputs(lm: LanguageModel, classes: int) -> Callable[..., Any]:
    """Return `f(params, x) -> [N, C]`."""
    return label_difference(lm, WORDS[:2]) if classes == 1 else label_logits(lm, WORDS[:classes])


def jax_methods(f: Callable[..., Any]) -> dict[str, Any]:
    """Return the methods as functions of (params, x1, x2)."""

    run = kernel(f, method="factorized")

    def always(matrix, table):
        def traced(params, x1, x2):
            chosen = mock.Mock(side_effect=lambda op, *_: table if op == "embed" else matrix)
            with mock.patch.object(cost, "choose", chosen):
                return run(params, x1, x2)

        return traced

    return {
        "factorized": run,
        "factorized, paired": always("paired", "matches"),
        "factorized, chunked": always("chunked", "chunked"),
        "jacobian contraction": kernel(f, method="jacobian"),
    }


def kernel(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return a function of (params, x1, x2) that computes one block, for `jax.jit`."""
    block = KernelOptions(block_size=2**20, check=False)
    return functools.partial(kernels.ntk, f, options=block, **options)


def problem(classes: int, length: int, config: ModelConfig = SMALL, counts=COUNTS):
    """Return (lm, f, x1, x2)."""
    lm = LanguageModel(config, init_params(config, jax.random.key(0)))
    x1, x2 = (examples(config, count, length, seed) for seed, count in enumerate(counts))
    return lm, outputs(lm, classes), x1, x2


def torch_peer(lm: LanguageModel, classes: int) -> Any:
    """Return the peer in PyTorch, or None if PyTorch is not installed."""
    try:
        from benchmarks.torch_ntk import TorchKernel
    except ImportError as missing:
        print(f"no PyTorch rows, since {missing.name} is not installed (extra: parity)")
        return None
    return TorchKernel(lm, WORDS[: max(classes, 2)], classes)


def whole_kernels(length: int, classes: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the table of whole kernels."""
    config, counts, jvps = SMALL, COUNTS, JVPS
    if options.quick:
        config, counts, jvps = QUICK_CONFIG, QUICK_COUNTS, QUICK_JVPS
    lm, f, x1, x2 = problem(classes, length, config, counts)
    arguments = (lm.params, *jax.tree.map(jnp.asarray, (x1, x2)))
    calls, compiled, values, notes = {}, {}, {}, {}
    for name, function in jax_methods(f).items():
        program, seconds = common.compiled(jax.jit(function), *arguments)
        compiled[name] = (program, seconds)
        calls[name] = functools.partial(program, *arguments)
        values[name] = np.asarray(calls[name]())
    reference = values["jacobian contraction"]
    peer = None if options.no_torch else torch_peer(lm, classes)
    estimated = {}
    if peer is not None:
        torch_x = [peer.batch(x) for x in (x1, x2)]
        one = tuple(part[:1] for part in torch_x[0])
        calls["torch.func, jacrev"] = lambda: peer.jacobians(*torch_x)
        reference = values["torch.func, jacrev"] = peer.jacobians(*torch_x)
        values["torch.func, vjp and jvp"] = peer.pairs(one, torch_x[1])
        for batch, times in ((counts[1], min(3, jvps)), (1, jvps)):
            name = f"LM-Kernel-FT, {batch}"
            estimate = functools.partial(peer.loop_estimate, *torch_x, times, batch)
            values[name] = estimate()[0][None]
            estimated[name] = lambda estimate=estimate: estimate()[1]
        estimated["torch.func, vjp and jvp"] = lambda: (
            common.seconds(lambda: peer.pairs(one, torch_x[1])) * counts[0]
        )
    found: dict[str, list[float]] = {name: [] for name in estimated}
    times = common.interleaved(calls, options.repeats)
    for name, estimate in estimated.items():
        notes[name] = "estimated"
        for _ in range(min(3, options.repeats)):
            time.sleep(common.REST)
            found[name].append(estimate())
        times[name] = float(np.median(found[name]))
    rows = []
    for name, seconds in times.items():
        value = values[name]
        part = reference[: value.shape[0], :, : value.shape[2]]
        program, compile_s = compiled.get(name, (None, None))
        held = None
        if name in calls and not options.quick:
            held = common.in_fresh_process(f"ntk.resident({name!r}, {length}, {classes})")
        rows.append(
            {
                "method": name,
                "T": length,
                "C": classes,
                "seconds": seconds,
                "times": seconds / times["factorized"],
                "peak_MB": program and common.peak_bytes(program) / 1e6,
                "resident_MB": held,
                "compile_s": compile_s,
                "difference": float(np.abs(value - part).max() / np.abs(reference).max()),
                "note": notes.get(name),
            }
        )
    return rows


def resident(name: str, length: int, classes: int) -> float:
    """Return the MB that a method adds to the peak memory of this process."""
    lm, f, x1, x2 = problem(classes, length)
    if name.startswith("torch"):
        peer = torch_peer(lm, classes)
        torch_x = [peer.batch(x) for x in (x1, x2)]
        before = common.fresh_peak()
        peer.jacobians(*torch_x)
    else:
        arguments = (lm.params, *jax.tree.map(jnp.asarray, (x1, x2)))
        function = jax_methods(f)[name]
        program, _ = common.compiled(jax.jit(function), *arguments)
        before = common.fresh_peak()
        jax.block_until_ready(program(*arguments))
    return (common.resident_bytes() - before) / 1e6


MATRICES = {"attention": (256, 256), "up": (256, 1024), "down": (1024, 256)}
TABLES = {"tokens": (2000, 256), "positions": (512, 256)}


def parts(
    length: int, classes: int, repeats: int, counts: tuple[int, int] = COUNTS
) -> list[dict[str, Any]]:
    """Return the rows of the table of contractions."""
    pairing = Pairing(kernels.SGD(), "full", counts[0])
    count = sum(counts)
    key = jax.random.key(0)
    rows = []
    for name, (inputs, width) in MATRICES.items():
        a = jax.random.normal(key, (count, length, inputs))
        b = jax.random.normal(key, (classes, count, length, width))

        def matrix(contraction, a, b):
            return leaf_kernels.dense(pairing, a, b, contraction).kernel

        chosen = cost.dense(counts, (classes, classes**2), length, inputs, width)
        rows.append(part_row(name, matrix, ("paired", "chunked"), chosen, (a, b), repeats))
    for name, shape in TABLES.items():
        ids = jax.random.randint(key, (count, length), 0, shape[0])
        if name == "positions":
            ids = jnp.broadcast_to(jnp.arange(length) + 2, (count, length))
        b = jax.random.normal(key, (classes, count, length, shape[1]))

        def table(contraction, ids, b, shape=shape):
            rows = leaf_kernels.lookup_rows(ids, b)
            return leaf_kernels.table(pairing, shape, [rows], None, contraction).kernel

        chosen = cost.table(counts, (classes, classes**2), length, *shape)
        rows.append(part_row(name, table, ("matches", "chunked"), chosen, (ids, b), repeats))
    return [{"part": row.pop("part"), "T": length, "C": classes, **row} for row in rows]


def part_row(part, function, names, chosen, arguments, repeats) -> dict[str, Any]:
    """Time the two contractions of one part."""
    calls = {}
    for name in names:
        program = jax.jit(functools.partial(function, name)).lower(*arguments).compile()
        calls[name] = functools.partial(program, *arguments)
    times = common.interleaved(calls, repeats)
    pairs = {"pairs_s": times[names[0]], "chunked_s": times["chunked"]}
    over = times[chosen] / min(times.values())
    return {"part": part, **pairs, "chosen": chosen, "over_best": over}


def waits(kinds: Sequence[str], counts: tuple[int, int] = COUNTS) -> list[dict[str, Any]]:
    """Time the first and second kernel of a kind, without a compilation cache on disk."""
    jax.config.update("jax_enable_compilation_cache", False)
    lm, f, x1, x2 = problem(1, 16, counts=counts)
    rows = []
    for kind in kinds:
        call = functools.partial(kernels.ntk, f, lm.params, x1, x2, kind=kind)
        first, second = (common.seconds(call) for _ in range(2))
        rows.append({"kind": kind, "first_s": first, "second_s": second})
    return rows


def scaling(repeats: int) -> list[dict[str, Any]]:
    """Time `factorized` for growing numbers of examples, tokens and parameters."""
    rows = []
    for what, changes in {
        "N": [{"counts": (n, 2 * n)} for n in (8, 16, 32, 64)],
        "T": [{"length": t} for t in (16, 32, 64, 128)],
        "P": [{"config": SMALL.replace(**width_of(width))} for width in (128, 256, 384, 512)],
    }.items():
        calls, sizes = {}, {}
        for i, change in enumerate(changes):
            lm, f, x1, x2 = problem(1, **{"length": 32, **change})
            program = jax.jit(kernel(f, method="factorized"))
            calls[str(i)] = functools.partial(program, lm.params, x1, x2)
            count = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
            sizes[str(i)] = {"N": len(x1["positions"]), "T": x1["input_ids"].shape[1], "P": count}
        times = common.interleaved(calls, repeats)
        for i, size in sizes.items():
            ratio = size[what] / sizes["0"][what]
            rows.append(
                {"grows": what, **size, "seconds": times[i], "times": ratio}
                | {"time_times": times[i] / times["0"]}
            )
    return rows


def width_of(width: int) -> dict[str, int]:
    """Return the sizes of a model of another width, with heads of 64."""
    heads = width // 64
    sizes = {"hidden_size": width, "embedding_size": width, "intermediate_size": 4 * width}
    return {**sizes, "num_heads": heads, "num_kv_heads": heads}


def roberta_base(columns: int = 936, block: int = 234) -> list[dict[str, Any]]:
    """Time 32 examples against 936 of 32 tokens, in blocks of columns."""
    lm, f, x1, x2 = problem(1, 32, ROBERTA_BASE, (COUNTS[0], columns))
    arguments = jax.tree.map(jnp.asarray, (x1, {k: a[:block] for k, a in x2.items()}))
    program, compile_s = common.compiled(
        jax.jit(kernel(f, method="factorized")), lm.params, *arguments
    )
    start = time.perf_counter()
    found = []
    for at in range(0, columns, block):
        part = {k: jnp.asarray(a[at : at + block]) for k, a in x2.items()}
        found.append(np.asarray(program(lm.params, arguments[0], part)))
        print(
            f"RoBERTa-base: {at + block} columns, {time.perf_counter() - start:.0f} s", flush=True
        )
    seconds = time.perf_counter() - start
    few = {k: jnp.asarray(a[:2]) for k, a in x1.items()}
    others = {k: a[:2] for k, a in arguments[1].items()}
    exact = kernels.ntk(f, lm.params, few, others, method="jacobian", options=UNCHECKED)
    difference = np.abs(found[0][:2, :, :2] - exact).max() / np.abs(exact).max()
    row = {"shape": "RoBERTa-base", "N": COUNTS[0], "N'": columns, "T": 32, "C": 1}
    row |= {"seconds": seconds, "peak_MB": common.peak_bytes(program) / 1e6}
    return [row | {"compile_s": compile_s, "difference": float(difference)}]


def bfloat16(kinds: Sequence[str] = KINDS) -> list[dict[str, Any]]:
    """Return the error of kernels in bfloat16, of 8 examples of 16 tokens."""
    lm, f, x, _ = problem(1, 16, counts=(8, 8))
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), lm.params)
    rows = []
    for kind in kinds:
        run = jax.jit(kernel(f, method="factorized", kind=kind))
        exact, found = (np.asarray(run(params, x)) for params in (lm.params, rounded))
        row = {"kind": kind, "largest": float(np.abs(found - exact).max() / np.abs(exact).max())}
        error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        rows.append({**row, "frobenius": error})
    return rows


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few short examples, two repeats")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--classes", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--roberta-base", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.lengths, options.classes = [16], [1]
        options.repeats = min(2, options.repeats)
    cases = [(length, c) for length in options.lengths for c in options.classes]
    few = options.quick
    report = {"waits": waits(KINDS[:1] if few else KINDS, QUICK_COUNTS if few else COUNTS)}
    common.print_table(report["waits"])
    report |= {"kernels": [], "parts": []}
    for length, classes in cases:
        rows = whole_kernels(length, classes, options)
        print(f"T={length}, C={classes}", flush=True)
        common.print_table(rows)
        report["kernels"] += rows
    for length, classes in cases:
        counts = QUICK_COUNTS if options.quick else COUNTS
        report["parts"] += parts(length, classes, options.repeats, counts)
    common.print_table(report["parts"])
    if options.scaling:
        report["scaling"] = scaling(options.repeats)
        common.print_table(report["scaling"])
    if options.roberta_base:
        report["roberta_base"] = roberta_base()
        common.print_table(report["roberta_base"])
    report["bfloat16"] = bfloat16(KINDS[:1] if options.quick else KINDS)
    common.print_table(report["bfloat16"])
    rows = [{"table": name, **row} for name, table in report.items() for row in table]
    common.print_report("ntk", rows)


if __name__ == "__main__":
    main()
