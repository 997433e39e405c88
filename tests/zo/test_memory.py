"""A MeZO step lives in the memory of inference, by the compiler's own account."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.common import peak_bytes
from benchmarks.shapes import OPT_125M
from jaxlm import zo
from jaxlm.models import LanguageModel, init_params
from tests.zo.problems import label_word_loss

pytestmark = pytest.mark.optimized

ROOT = Path(__file__).parents[2]
ROWS, LENGTH = 16, 64
# Buffers are assigned before machine code is made.
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}


def shapes(dtype):
    params = jax.eval_shape(lambda key: init_params(OPT_125M, key, dtype), jax.random.key(0))
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32)
        for name, shape in {
            "input_ids": (ROWS, LENGTH),
            "attention_mask": (ROWS, LENGTH),
            "positions": (ROWS,),
            "labels": (ROWS,),
        }.items()
    }
    return params, batch


def measure(sampler: str, dtype: str) -> dict[str, int]:
    """Bytes of a step and of a forward pass, in this process."""
    params, batch = shapes(dtype)
    loss_fn = label_word_loss(LanguageModel(OPT_125M, params), [5, 9])
    opt = zo.mezo(1e-6, sampler=getattr(zo, sampler)(), weight_decay=0.1)
    state = jax.eval_shape(opt.init, params, jax.random.key(0))
    forward = jax.jit(loss_fn).lower(params, batch).compile(FAST_TO_COMPILE)
    step = zo.jit_step(opt, loss_fn).lower(params, state, batch).compile(FAST_TO_COMPILE)
    table = params["embed"]["tokens"]["embedding"]
    return {
        "step": peak_bytes(step),
        "forward": peak_bytes(forward),
        "step_temporary": step.memory_analysis().temp_size_in_bytes,
        "forward_temporary": forward.memory_analysis().temp_size_in_bytes,
        "reused": step.memory_analysis().alias_size_in_bytes,
        "stored": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)),
        "table": table.size * table.dtype.itemsize,
    }


def measured(sampler: str, dtype: str) -> dict[str, int]:
    """`measure`, in a process with one device.

    With the eight of the tests, jaxlib 0.10.1 copies a table.
    """
    code = (
        "import json; from tests.zo.test_memory import measure; "
        f"print(json.dumps(measure({sampler!r}, {dtype!r})))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("sampler", "dtype"),
    [
        ("gaussian", "float32"),
        pytest.param("rademacher", "float32", marks=pytest.mark.slow),
        pytest.param("gaussian", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_a_step_takes_the_memory_of_a_forward_pass(sampler, dtype):
    found = measured(sampler, dtype)
    print(f"{sampler} {dtype}: {found['step'] / found['forward']:.3f} of a forward pass")
    temporary = found["step_temporary"]
    if dtype == "bfloat16":
        # For a CPU the compiler widens the stacked weights before the loop, in both programs.
        temporary -= found["forward_temporary"]

    assert found["reused"] >= found["stored"]
    assert temporary < found["table"]
    assert found["step"] <= 1.15 * found["forward"]


@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(
    "make", [zo.mezo, pytest.param(zo.lozo, marks=pytest.mark.slow), zo.lozo_residual]
)
def test_a_loss_without_a_view_is_called_on_one_copy_at_a_time(make, n):
    """Both signs of all directions one after another: twice the parameters, as `spsa` says."""
    params = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
    opt = make(0.1, num_directions=n)
    state = jax.eval_shape(opt.init, params, jax.random.key(1))
    step = zo.jit_step(opt, lambda params, batch: jnp.sum(jnp.sin(params["w"] @ batch)))
    batch = jax.ShapeDtypeStruct((1024, 1), jnp.float32)
    compiled = step.lower(params, state, batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.25 * 4 * 512 * 1024
