"""A run of local SGD with momentum that may be killed; `python -m tests.dynamics.local_run`."""

import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.dynamics import local
from jaxlm.train.checkpoint import Checkpoints

WORKERS, STEPS, EVERY = 4, 30, 3


def optimizer():
    return local.local_update(
        optax.adam(0.05), local.constant_h(8), lambda step: 0.05, total_steps=STEPS
    )


def loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["first"])
    return jnp.mean((hidden @ params["second"] - y) ** 2)


def batches(first):
    numbers = np.random.default_rng(3)
    x = numbers.normal(size=(WORKERS, STEPS, 6, 5)).astype(np.float32)[:, first : first + EVERY]
    return x, np.sin(x.sum(-1, keepdims=True))


def start():
    keys = jax.random.split(jax.random.key(0))
    params = {"first": jax.random.normal(keys[0], (5, 7)) / 2}
    params["second"] = jax.random.normal(keys[1], (7, 1)) / 2
    return local.start_workers(optimizer(), params, WORKERS)


def train(folder, killed_after=None):
    """From the last checkpoint of the folder to the end, saving every third step."""
    checkpoints, workers = Checkpoints(folder), start()
    found = checkpoints.restore(workers)
    step = 0
    if found is not None:
        step, workers, _ = found
    run = jax.jit(
        lambda workers, part: local.run_workers(
            optimizer(), jax.value_and_grad(loss), workers, part
        )
    )
    while step < STEPS:
        workers, _ = run(workers, batches(step))
        step += EVERY
        if step == killed_after:
            jax.block_until_ready(workers)
            os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.save(step, workers, {})
    return workers


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
