"""The short model card that a saved model gets."""

from jaxlm.models.config import ModelConfig

_AUTO = {
    "lm": "AutoModelForCausalLM",
    "mlm": "AutoModelForMaskedLM",
    "classifier": "AutoModelForSequenceClassification",
    "none": "AutoModel",
}


def model_card(config: ModelConfig, name: str, dtype: str, num_params: int) -> str:
    """What a reader needs to know of a model's folder: what is in it and how it is opened.

    Args:
      config: the model.
      name: its title.
      dtype: of the stored weights.
      num_params: number of parameters.
    """
    auto = _AUTO[config.head]
    return f"""---
library_name: jaxlm
---

# {name}

A {config.family} {config.kind} of {num_params:,} parameters in {dtype}: {config.num_layers} layers
of width {config.hidden_size}, {config.num_heads} heads, a vocabulary of {config.vocab_size:,}.

It opens in jaxlm:

```python
import jaxlm

lm = jaxlm.from_pretrained("path/to/this/folder")
```

and in transformers:

```python
from transformers import {auto}

model = {auto}.from_pretrained("path/to/this/folder")
```
"""
