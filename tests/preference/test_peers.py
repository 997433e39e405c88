"""Every loss that TRL has, computed by its own trainers from the same logits."""

import collections
import importlib
import types
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import preference
from jaxlm.preference import LOSSES, PairScores

pytestmark = pytest.mark.torch

B, T, V = 5, 9, 7
BETA = 0.3
LENGTHS = np.array([6, 1, 4, 3, 5, 2, 5, 4, 3, 6])


class Batch(NamedTuple):
    """Tokens [2B, T] of pairs, chosen first, padded on the right, and logits [2B, T, V]."""

    ids: Any
    attention: Any
    completion: Any
    logits: Any
    ref_logits: Any

    def log_probs(self, logits):
        log_p = jax.nn.log_softmax(logits)[:, :-1]
        picked = jnp.take_along_axis(log_p, self.ids[:, 1:, None], 2)[..., 0]
        return picked, jax.nn.logsumexp(2 * log_p, axis=-1)

    def scores(self, alpha=1.0, **fields):
        mask = jnp.asarray(self.completion[:, 1:])
        lengths = np.split(self.completion.sum(1), 2)
        shared = jnp.asarray(np.tile(np.minimum(*lengths), 2))
        sums = [
            half
            for logits in (self.logits, self.ref_logits)
            for half in jnp.split(
                preference.ld_log_probs(self.log_probs(logits)[0], mask, shared, alpha), 2
            )
        ]
        return PairScores(*sums, *lengths, **fields)


def make_batch(prompt=2):
    rng = np.random.default_rng(0)
    at = np.arange(T)
    attention = (at < prompt + LENGTHS[:, None]).astype(int)
    logits = 2 * rng.normal(size=(2, 2 * B, T, V))
    return Batch(rng.integers(0, V, (2 * B, T)), attention, attention * (at >= prompt), *logits)


@pytest.fixture
def batch():
    with jax.enable_x64(True):
        yield make_batch()


def trainer_of(module, name, **fields):
    """Return a trainer of TRL with these attributes, without a model or data of its own."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = object.__new__(getattr(importlib.import_module(module), name))

    def same(x):
        return x

    common = {
        "accelerator": types.SimpleNamespace(
            device=torch.device("cpu"), gather=same, gather_for_metrics=same
        ),
        "model": types.SimpleNamespace(training=True),
        "aux_loss_enabled": False,
        "is_encoder_decoder": False,
        "beta": BETA,
        "label_smoothing": 0.1,
        "precompute_ref_logps": True,
        "_metrics": collections.defaultdict(lambda: collections.defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    vars(trainer).update(common | fields)
    return trainer


def fused(logits):
    """Return a model that answers as TRL's fused head does, given labels."""
    import torch

    def forward(labels, **_):
        log_p = logits.log_softmax(-1)[:, :-1]
        targets = labels[:, 1:]
        picked = log_p.gather(2, targets.clamp(min=0)[..., None])[..., 0]
        zeros = torch.zeros_like(picked)
        return types.SimpleNamespace(
            log_probs=torch.where(targets == -100, zeros, picked),
            log_sum_sq_probs=(2 * log_p).logsumexp(-1),
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )

    return forward


def trl_dpo(batch, kinds, dtype="float64", **options):
    """Return the loss of TRL's DPO trainer, for kinds with weights, and its metrics."""
    import torch

    fields = {
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
        "ld_alpha": None,
        "loss_types": list(kinds),
        "loss_weights": list(kinds.values()),
        "args": types.SimpleNamespace(discopop_tau=0.05),
    }
    trainer = trainer_of("trl.trainer.dpo_trainer", "DPOTrainer", **fields | options)
    scores = batch.scores(options.get("ld_alpha", 1.0))
    reference = [
        torch.tensor(np.array(x), dtype=getattr(torch, dtype))
        for x in (scores.ref_chosen, scores.ref_rejected)
    ]
    inputs = {
        "input_ids": torch.tensor(batch.ids),
        "attention_mask": torch.tensor(batch.attention),
        "completion_mask": torch.tensor(batch.completion),
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    model = fused(torch.tensor(batch.logits, dtype=getattr(torch, dtype)))
    return trainer._compute_loss(model, inputs, False).item(), trainer._metrics["train"]


THEIRS = {
    "dpo": "sigmoid",
    "dpo_norm": "sigmoid_norm",
    **{
        name: name
        for name in (
            *("hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
            *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft"),
        )
    },
}
SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}


def ours(name, **options):
    options |= {"beta": BETA} if name != "sft" else {}
    options |= {"label_smoothing": 0.1} if name in SMOOTHED else {}
    return LOSSES[name](**options)


@pytest.mark.parametrize("name", THEIRS)
def test_losses_of_the_dpo_trainer(batch, name):
    expected, metrics = trl_dpo(batch, {THEIRS[name]: 1.0})
    np.testing.assert_allclose(ours(name)(batch.scores()).mean(), expected, rtol=1e-6)
    accuracy = preference.reward_accuracy(batch.scores())
    np.testing.assert_allclose(accuracy, metrics["rewards/accuracies"][0], rtol=1e-6)


@pytest.mark.parametrize("name", ["dpo", "hinge", "ipo", "dpo_norm", "robust", "discopop"])
@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_divergences(batch, name, divergence):
    full = {"js": "js_divergence", "alpha": "alpha_divergence"}.get(divergence, divergence)
    # TRL computes the powers of an alpha divergence in float32, and has no case for float64.
    dtype, rtol = ("float32", 1e-5) if divergence == "alpha" else ("float64", 1e-6)
    expected, _ = trl_dpo(batch, {THEIRS[name]: 1.0}, dtype, f_divergence_type=full)
    found = ours(name, f_divergence=divergence)(batch.scores()).mean()
    np.testing.assert_allclose(found, expected, rtol=rtol)


def test_a_mixture(batch):
    expected, _ = trl_dpo(batch, {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0})
    found = preference.loss(
        batch.scores(), [("dpo", 0.8), ("bco_pair", 0.2), ("sft", 1.0)], beta=BETA
    )
    np.testing.assert_allclose(found.mean(), expected, rtol=1e-6)


def test_ld_dpo(batch):
    expected, _ = trl_dpo(batch, {"sigmoid": 1.0}, ld_alpha=0.4)
    found = ours("dpo")(batch.scores(alpha=0.4)).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_wpo(batch):
    expected, _ = trl_dpo(batch, {"sigmoid": 1.0}, use_weighting=True)
    mask = jnp.asarray(batch.completion[:, 1:])
    weights = preference.wpo_weight(*batch.log_probs(batch.logits), mask)
    values = ours("dpo")(batch.scores()) * weights[:B] * weights[B:]
    np.testing.assert_allclose(values.mean(), expected, rtol=1e-6)


@pytest.mark.parametrize("z", [-1.0, 0.7])
def test_kto(batch, z):
    import torch

    trainer = trainer_of(
        "trl.trainer.kto_trainer",
        "KTOTrainer",
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.3,
        undesirable_weight=0.6,
        _compute_kl_logps=lambda model, batch: torch.full((2 * B,), z).double(),
    )
    scores = batch.scores(z=jnp.asarray(z))
    reference = np.concatenate([scores.ref_chosen, scores.ref_rejected])
    inputs = {
        "input_ids": torch.tensor(batch.ids),
        "attention_mask": torch.tensor(batch.attention),
        "completion_mask": torch.tensor(batch.completion),
        "label": torch.arange(2 * B) < B,
        "ref_logps": torch.tensor(reference),
        "ref_KL_logps": torch.zeros(2 * B).double(),
    }
    expected = trainer._compute_loss(fused(torch.tensor(batch.logits)), inputs, False).item()
    found = ours("kto", desirable_weight=1.3, undesirable_weight=0.6)(scores)
    np.testing.assert_allclose(found.mean(), expected, rtol=1e-6)


def trl_reference_free(batch, module, name, **fields):
    import torch

    trainer = trainer_of(
        f"trl.experimental.{module}", name, padding_value=0, pad_token_id=0, **fields
    )
    inputs = {}
    for i, side in enumerate(("chosen", "rejected")):
        rows = slice(i * B, (i + 1) * B)
        scored = batch.completion[rows] == 1
        inputs[f"{side}_input_ids"] = torch.tensor(batch.ids[rows])
        inputs[f"{side}_attention_mask"] = torch.tensor(batch.attention[rows])
        inputs[f"{side}_labels"] = torch.tensor(np.where(scored, batch.ids[rows], -100))
    logits = torch.tensor(batch.logits)
    loss, _ = trainer.get_batch_loss_metrics(
        lambda *_, **__: types.SimpleNamespace(logits=logits), inputs, "train"
    )
    return loss.item()


def test_cpo(batch):
    expected = trl_reference_free(
        batch,
        "cpo.cpo_trainer",
        "CPOTrainer",
        loss_type="sigmoid",
        alpha=0.0,
        cpo_alpha=0.7,
        label_smoothing=0.0,
    )
    np.testing.assert_allclose(ours("cpo", alpha=0.7)(batch.scores()).mean(), expected, rtol=1e-6)


def test_simpo(batch):
    expected = trl_reference_free(
        batch,
        "cpo.cpo_trainer",
        "CPOTrainer",
        loss_type="simpo",
        alpha=0.0,
        simpo_gamma=0.8,
        cpo_alpha=0.0,
        label_smoothing=0.0,
    )
    np.testing.assert_allclose(ours("simpo", gamma=0.8)(batch.scores()).mean(), expected, rtol=1e-6)


def test_orpo():
    """With prompts of one token, which nothing predicts, TRL's likelihood is that of responses."""
    with jax.enable_x64(True):
        batch = make_batch(prompt=1)
        expected = trl_reference_free(batch, "orpo.orpo_trainer", "ORPOTrainer")
        found = ours("orpo", variant="released")(batch.scores()).mean()
        # TRL computes the odds in float32.
        np.testing.assert_allclose(found, expected, rtol=1e-5)
