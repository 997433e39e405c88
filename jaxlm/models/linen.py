"""The same models as Flax Linen modules, for those who train with Flax."""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from jaxlm.models import transformer
from jaxlm.models.config import ModelConfig
from jaxlm.models.initialise import init_leaf, nest, param_shapes


class Transformer(nn.Module):
    """Declares the tree of `ModelConfig` and applies it.

    `module.apply({"params": lm.params}, input_ids, ...)` is `lm.apply(lm.params, input_ids, ...)`,
    and `module.init(key, input_ids)["params"]` is like `init_params`.

    Attributes:
      config: the model; without a head, the module gives the hidden states.
      param_dtype: of every leaf that `init` makes.
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
            # Read as it is where it exists, since it may have an adapter's leaves too.
            name: self.get_variable("params", name)
            if self.has_variable("params", name)
            else self.param(name, subtree, name + ".")
            for name in names
        }
        forward = transformer.hidden if self.config.head == "none" else transformer.apply
        return forward(self.config, params, input_ids, attention_mask, **options)
