"""Turn a finished pretraining run into the model that ships with the package.

usage: python scripts/make_model_asset.py runs/pretrain-tiny jaxlm/assets/model

Writes the weights in bfloat16, the tokenizer, the learning curve and the model card.
"""

import json
import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import yaml

import jaxlm

CARD = """---
license: apache-2.0
library_name: jaxlm
pipeline_tag: text-generation
language: en
---

# The small language model of jaxlm

A causal language model of {parameters:.2f} M parameters ({family} layout: {layers} layers, width
{width}, {heads} heads, {vocab} byte-level BPE tokens, lower case), so that jaxlm can show its
methods without a network. It knows film reviews and little else, and it is no assistant.

- **Text**: {domains}. The film reviews, the pros and cons of product reviews and the two tasks'
  sentences are CC BY 4.0 (Pang and Lee 2002, 2004, 2005; Ganapathibhotla and Liu 2008), the rest is
  in the public domain. Of the two tasks, mr and subj, only training sentences were used, without
  labels. No sentence of their validation or test splits stands in the text:
  `scripts/prepare_corpus.py` removed them by normalised match.
- **Training**: {steps} steps of {batch} x {length} tokens, {tokens:.1f} M in all, in {hours:.1f}
  hours on one CPU core. `jaxlm pretrain configs/pretrain/tiny.yaml` does it again.{note}
- **Held-out bits per byte** (40 film reviews never seen): {bits:.3f} in the end.

![held-out bits per byte against tokens](learning_curve.png)

| tokens | held-out bits per byte |
|---|---|
{table}

It opens in jaxlm by `jaxlm.from_pretrained()` and in transformers by
`AutoModelForCausalLM.from_pretrained(folder)`. The prompt starts with `<eos>`, which the tokenizer
puts there.
"""


def main(run: Path, out: Path, note: str = "") -> None:
    """Write the asset."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [(row["tokens"], row["held_out.bits_per_byte"]) for row in rows if _BITS in row]
    lm = jaxlm.from_pretrained(run / "model", param_dtype="bfloat16")
    jaxlm.save_pretrained(lm, out)
    figure, axis = plt.subplots(figsize=(5, 3))
    axis.plot([tokens / 1e6 for tokens, _ in curve], [bits for _, bits in curve], "o-")
    axis.set(xlabel="million tokens", ylabel="held-out bits per byte")
    figure.tight_layout()
    figure.savefig(out / "learning_curve.png", dpi=80)
    card = CARD.format(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(lm.params)) / 1e6,
        family=lm.config.family,
        layers=lm.config.num_layers,
        width=lm.config.hidden_size,
        heads=lm.config.num_heads,
        vocab=lm.config.vocab_size,
        domains=", ".join(each["name"] for each in config["corpus"]["domains"]),
        steps=config["steps"],
        batch=config["batch_size"],
        length=config["seq_len"],
        tokens=rows[-1]["tokens"] / 1e6,
        hours=rows[-1]["seconds"] / 3600,
        bits=curve[-1][1],
        table="\n".join(f"| {tokens / 1e6:.2f} M | {bits:.3f} |" for tokens, bits in curve),
        note=note and f" {note}",
    )
    (out / "README.md").write_text(card)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size / 2**20:.2f} MiB, {np.round(curve[-1][1], 3)} bits per byte")


_BITS = "held_out.bits_per_byte"

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
