"""What does a zeroth-order step cost beyond its forward passes?

usage: python -m benchmarks.mezo_step [--quick] [--dtype float32|bfloat16] [--repeats 7]
                                      [--model FOLDER] [--methods NAME ...]

Times one step of each method, one of Adam by backpropagation and two compiled forward passes of the
same objective in turns, at the shape of OPT-125M with 16 rows of 64 tokens and at the size of the
shipped model; or on a model of your own, such as `--model smollm2`. MeZO in PyTorch on the same
weights and tokens, as published and in a fast version (`benchmarks.torch_mezo`), follows last,
since PyTorch's threads would slow the others. --quick has only the small shape, without the methods
that take longest to compile. The columns:

  forwards            forward passes in a step
  over_forwards       time over that of as many forward passes, in the same framework
  torch_over_it       time of the published PyTorch step per forward pass, over that of this method
  in_place_over_it    the same for the fast PyTorch step
  over_forward_peak   peak memory over that of a forward pass, by the compiler
  loss_difference     difference of a loss from a check: for jaxlm the loss at perturbed copies of
                      the parameters, for PyTorch the loss of jaxlm's forward pass

The last line is one JSON object.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks import common
from benchmarks.shapes import LABEL_WORDS, OPT_125M, SHIPPED, make_batch, random_model
from jaxlm import from_pretrained, zo
from jaxlm.models import LanguageModel
from jaxlm.train.losses import classification_objective

EPS, LEARNING_RATE = 1e-3, 1e-6
METHODS = {
    "MeZO, gaussian": zo.mezo(LEARNING_RATE, eps=EPS),
    "MeZO, rademacher": zo.mezo(LEARNING_RATE, eps=EPS, sampler=zo.rademacher()),
    "LOZO, rank 2": zo.lozo(LEARNING_RATE, eps=EPS, rank=2),
    "LOZO, residual": zo.lozo_residual(LEARNING_RATE, eps=EPS, rank=2),
    "FZOO, n=8": zo.fzoo(LEARNING_RATE, eps=EPS, num_directions=8),
    "ZO-Muon, rank 64, n=4": zo.zo_muon(LEARNING_RATE, eps=EPS, rank=64, num_directions=4),
}
FORWARD, FULL = "two forwards", "two forwards, torch, all logits"
QUICK = ("MeZO, gaussian", "MeZO, rademacher", "LOZO, rank 2", "FZOO, n=8")
LEAN = "two forwards, torch, label words"
PUBLISHED, IN_PLACE = "MeZO as published, torch", "MeZO in place, torch"


class Method(NamedTuple):
    """Something to time.

    Attributes:
      name: name in the table.
      call: does it once.
      base: name of the two forward passes that it is compared with.
      forwards: number of forward passes; None if there is a backward pass.
      program: the compiled program, if any.
      compile_s: seconds of compilation.
      difference: |loss - loss of the check|, if there is a check.
    """

    name: str
    call: Callable[[], Any]
    base: str
    forwards: int | None = 2
    program: Any = None
    compile_s: float | None = None
    difference: float | None = None


class Stepper:
    """A compiled step that donates parameters and state, called again and again."""

    def __init__(self, step: Callable[..., Any], params: Any, state: Any, batch: Any):
        jitted = jax.jit(step, donate_argnums=(0, 1))
        self.program, self.compile_s = common.compiled(jitted, params, state, batch)
        self.batch = batch
        self.params, self.state = jax.tree.map(jnp.copy, (params, state))

    def __call__(self) -> Any:
        self.params, self.state, self.seen = self.program(self.params, self.state, self.batch)
        return self.params, self.seen


def forwards(loss_fn: Callable[..., Any], params: Any, batch: Any) -> Method:
    """Return two forward passes."""
    program, compile_s = common.compiled(jax.jit(loss_fn), params, batch)

    def call():
        return program(params, batch), program(params, batch)

    return Method(FORWARD, call, FORWARD, 2, program, compile_s)


def zeroth_order(
    name: str, opt: zo.ZerothOrderOptimizer, loss_fn: Callable[..., Any], params: Any, batch: Any
) -> Method:
    """Return a step without gradients; its first losses are compared with perturbed copies."""
    state = opt.init(params, jax.random.key(0))

    def copied(params, batch):
        return loss_fn(params, batch)

    def losses(params, state):
        return opt.step(copied, params, state, batch)[2].loss_plus

    expected = jax.block_until_ready(jax.jit(losses)(params, state))

    def step(params, state, batch):
        return opt.step(loss_fn, params, state, batch)

    stepper = Stepper(step, params, state, batch)
    difference = float(jnp.abs(stepper()[1].loss_plus - expected).max())
    return Method(
        name, stepper, FORWARD, opt.forwards, stepper.program, stepper.compile_s, difference
    )


def adam(loss_fn: Callable[..., Any], params: Any, batch: Any) -> Method:
    """Return a step with gradients."""
    tx = optax.adam(LEARNING_RATE)
    stepper = Stepper(common.gradient_step(tx, loss_fn), params, tx.init(params), batch)
    name = "Adam, backpropagation"
    return Method(name, stepper, FORWARD, None, stepper.program, stepper.compile_s)


def torch_methods(lm: LanguageModel, batch: Any, expected: float) -> list[Method]:
    """Return the same in eager PyTorch; no rows if PyTorch is not installed."""
    try:
        from benchmarks.torch_mezo import TorchMezo, choose_threads
    except ImportError as missing:
        print(f"no PyTorch rows, since {missing.name} is not installed (extra: parity)")
        return []
    peer = TorchMezo(lm, batch, LABEL_WORDS, eps=EPS, learning_rate=LEARNING_RATE)
    gaps = [abs(call()[0] - expected) for call in (peer.two_full, peer.two_lean)]
    print(f"PyTorch with {choose_threads(peer.two_full)} threads", flush=True)
    return [
        Method(FULL, peer.two_full, FULL, difference=gaps[0]),
        Method(PUBLISHED, peer.published_step, FULL),
        Method(LEAN, peer.two_lean, LEAN, difference=gaps[1]),
        Method(IN_PLACE, peer.frugal_step, LEAN),
    ]


def measure(
    shape: str, lm: LanguageModel, chosen: list[str], repeats: int, *, peers_too: bool
) -> list[dict[str, Any]]:
    """Return a row for each method, timed in turns."""
    batch = make_batch(lm.config, rows=16, length=64)
    loss_fn = classification_objective(lm.apply, jnp.array(LABEL_WORDS))
    methods = [forwards(loss_fn, lm.params, batch)]
    methods += [zeroth_order(name, METHODS[name], loss_fn, lm.params, batch) for name in chosen]
    methods.append(adam(loss_fn, lm.params, batch))
    times = common.interleaved({method.name: method.call for method in methods}, repeats)
    if peers_too:  # last, since its threads would slow the others
        loss = float(methods[0].program(lm.params, batch)[0])
        peers = torch_methods(lm, batch, loss)
        times |= common.interleaved({peer.name: peer.call for peer in peers}, repeats)
        methods += peers
    peak = common.peak_bytes(methods[0].program)
    return [{"shape": shape, **row(method, times, peak)} for method in methods]


def row(method: Method, times: dict[str, float], forward_peak: int) -> dict[str, Any]:
    """Return a line of the table; see the module docstring."""
    seconds = times[method.name]
    passes = method.forwards or 2
    peak = method.program and common.peak_bytes(method.program)
    over_it = {
        name: times[peer] * passes / (2 * seconds) if peer in times else None
        for name, peer in (("torch_over_it", PUBLISHED), ("in_place_over_it", IN_PLACE))
    }
    return {
        "method": method.name,
        "forwards": method.forwards,
        "seconds": seconds,
        "over_forwards": 2 * seconds / (passes * times[method.base]),
        **over_it,
        "peak_MB": peak and peak / 1e6,
        "over_forward_peak": peak and peak / forward_peak,
        "compile_s": method.compile_s,
        "loss_difference": method.difference,
    }


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the small shape, two repeats")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model", help="a folder or hub id, in place of random weights")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    options = parser.parse_args()
    repeats = min(2, options.repeats) if options.quick else options.repeats
    methods = options.methods or list(QUICK if options.quick else METHODS)
    shapes = {"shipped size": SHIPPED} | ({} if options.quick else {"OPT-125M": OPT_125M})
    rows = []
    for shape in [options.model] if options.model else shapes:
        if options.model:
            lm = from_pretrained(shape, param_dtype=options.dtype)
        else:
            lm = random_model(shapes[shape], options.dtype)
        rows += measure(shape, lm, methods, repeats, peers_too=options.dtype == "float32")
    common.print_table(rows)
    common.print_report("mezo_step", rows)


if __name__ == "__main__":
    main()
