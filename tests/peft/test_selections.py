"""Which parameters BitFit and head tuning take, and what they refuse."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import peft
from jaxlm.core.errors import UserError
from jaxlm.core.paths import flatten, path_predicate
from jaxlm.models import save_pretrained
from tests.helpers.models import GOLDEN


def chosen(lm, select: str) -> set[str]:
    return {leaf.path for leaf in flatten(lm.params)[0] if path_predicate(select)(leaf.path)}


def test_biases():
    lm = jaxlm.from_pretrained(GOLDEN / "opt")
    names = {path.rsplit(".", 1)[-1] for path in chosen(lm, peft.bitfit_selection(lm))}
    assert names == {"bias"}
    assert "layers.attention.q_proj.bias" in chosen(lm, peft.BITFIT)
    with pytest.raises(UserError, match=r"^peft: needs a model with biases"):
        peft.bitfit_selection(jaxlm.from_pretrained(GOLDEN / "llama"))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("gpt2", {"embed.tokens.embedding"}),
        ("llama", {"lm_head.embedding"}),
        ("bert-untied", {"mlm.dense.kernel", "mlm.dense.bias", "mlm.norm.scale", "mlm.norm.bias",
                         "lm_head.embedding", "lm_head.bias"}),
        ("roberta-classifier", {"pooler.kernel", "pooler.bias", "classifier.kernel",
                                "classifier.bias"}),
    ],
)  # fmt: skip
def test_heads(name: str, wanted: set[str]):
    lm = jaxlm.from_pretrained(GOLDEN / name)
    assert chosen(lm, peft.head_selection(lm)) == wanted


def test_a_model_without_a_head():
    lm = jaxlm.from_pretrained(GOLDEN / "bert-base")
    with pytest.raises(UserError, match="lm: has no head to train"):
        peft.head_selection(lm)
    with pytest.raises(UserError, match="no output embedding to untie"):
        peft.untie(lm)


def test_an_untied_model_computes_the_same_and_is_saved(tmp_path: Path):
    lm, ids = jaxlm.from_pretrained(GOLDEN / "gpt2"), jnp.array([[5, 6, 7]])
    own = peft.untie(lm)
    assert chosen(own, peft.head_selection(own)) == {"lm_head.embedding"}
    table, copy = own.params["embed"]["tokens"]["embedding"], own.params["lm_head"]["embedding"]
    assert table.unsafe_buffer_pointer() != copy.unsafe_buffer_pointer()
    wanted = jax.jit(lm.apply)(lm.params, ids)
    np.testing.assert_allclose(jax.jit(own.apply)(own.params, ids), wanted, atol=1e-6)
    changed = own.replace(params={**own.params, "lm_head": {"embedding": 2 * copy}})
    save_pretrained(changed, tmp_path)
    again = jaxlm.from_pretrained(tmp_path)
    found = jax.jit(again.apply)(again.params, ids)
    np.testing.assert_allclose(found, 2 * wanted, atol=1e-5)
    assert peft.untie(own) is own
