"""The models as a Flax Linen module, for training with Flax."""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from jaxlm.models import transformer
from jaxlm.models.config import ModelConfig
from jaxlm.models.initialise import init_leaf, nest, param_shapes


class Transformer(nn.Module):
    """A module that declares the parameter tree of a configuration and applies it.

    `module.apply({"params": lm.params}, input_ids, ...)` is `lm.apply(lm.params, input_ids, ...)`,
    and `module.init(key, input_ids)["params"]` is like `init_params`.

    Attributes:
      config: the model; without a head, the module returns hidden states.
      param_dtype: dtype of the leaves of `init`.
    """

    config: ModelConfig
    param_dtype: Any = "float32"

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, **options) -> Float[Array, "..."]:
        def subtree(key, prefix: str):
            leaves = {
                path.removeprefix(prefix): init_leaf(
                    path, shape, self.config, key, self.param_dtype
                )
                for path, shape in param_shapes(self.config).items()
                if path.startswith(prefix)
            }
            return nest(leaves)

        names = dict.fromkeys(path.split(".")[0] for path in param_shapes(self.config))
        params = {
            # Use an existing subtree as it is, since it may have leaves of an adapter.
            name: self.get_variable("params", name)
            if self.has_variable("params", name)
            else self.param(name, subtree, name + ".")
            for name in names
        }
        forward = transformer.hidden if self.config.head == "none" else transformer.apply
        return forward(self.config, params, input_ids, attention_mask, **options)
