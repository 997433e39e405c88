"""How long does a step of DPO take, compared with TRL?

usage: python -m benchmarks.dpo_step [--model smollm2] [--quick] [--repeats 5]

LoRA (rank 8, all matrices of the layers) and AdamW in float32 on 8 pairs of 128 tokens, of which a
half or a quarter are the prompt: a step of jaxlm and one of `trl.DPOTrainer` on the same tokens, in
turns. Both have the reference's log-probabilities from before; TRL runs without gradient
checkpointing. jaxlm reads the prompt of a pair once, TRL with each of its responses. The tokens are
random, which changes nothing in the time.

The table has seconds, the ratio of times, the losses of the first step, log 2 in both, and the
compiler's peak memory for jaxlm. --quick has pairs of 32 tokens. The last line is one JSON object.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import common, sft_step
from benchmarks.sft_step import RANK, RATE, TARGETS
from jaxlm import from_pretrained
from jaxlm.data import EncodedTask
from jaxlm.data.encoding import Encoded
from jaxlm.data.pairs import as_task
from jaxlm.models import LanguageModel, save_pretrained
from jaxlm.peft import LORA, lora
from jaxlm.train.objectives import Preference
from jaxlm.train.objectives.preference import REFERENCE
from jaxlm.train.optimizers import Adam
from jaxlm.train.state import Program, many_steps, method

PAIRS = 8


def made_up(lm: LanguageModel, prompt: int, response: int) -> EncodedTask:
    """Return pairs of random tokens."""
    draw = np.random.default_rng(0)
    top = lm.config.vocab_size

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.integers(top // 10, top, count).tolist())

    pairs = [
        Encoded(0, (tokens(prompt),), (), (tokens(response), tokens(response)))
        for _ in range(PAIRS)
    ]
    return as_task({"train": pairs, "validation": [], "test": []}, lm.config.pad_id or 0)


class Ours:
    """A step of jaxlm's trainer on all pairs."""

    def __init__(self, lm: LanguageModel, encoded: EncodedTask):
        adapted = lora(lm, jax.random.key(0), rank=RANK, targets="|".join(TARGETS))
        objective = Preference()
        self.columns = objective.columns(adapted, adapted, encoded, batch_size=PAIRS)["train"]
        loss_fn = objective.loss_fn(adapted, None, encoded, {})
        made = method(Adam(learning_rate=RATE, select=LORA), loss_fn, 1000)
        batch = encoded.collate(encoded.train) | self.columns
        self.batch = {key: value[None] for key, value in batch.items()}
        params = jax.tree.map(lambda x: x.copy(), adapted.params)
        self.state = made.start(params, jax.random.key(0))
        self.program = Program(many_steps(made.step), moves=True)

    def __call__(self) -> float:
        self.state, info = self.program(self.state, self.batch)
        return float(info["loss"][0])


class Peer(sft_step.Peer):
    """A step of `trl.DPOTrainer` on all pairs."""

    def __init__(self, lm: LanguageModel, encoded: EncodedTask, reference: Any, folder: Path):
        import datasets
        import peft
        import transformers
        import trl

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        save_pretrained(lm, folder)
        texts = {name: ["a b", "a c"] for name in ("prompt", "chosen", "rejected")}
        args = trl.DPOConfig(
            output_dir=str(folder / "out"),
            per_device_train_batch_size=PAIRS,
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
            learning_rate=RATE,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        self.trainer = trl.DPOTrainer(
            model=str(folder),
            args=args,
            train_dataset=datasets.Dataset.from_dict(texts),
            peft_config=peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=list(TARGETS)),
        )
        self.optimizer = self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1  # set by `train`, which this replaces
        self.batch = self.trainer.data_collator(
            [
                {
                    "prompt_ids": list(each.input_ids[0]),
                    "chosen_ids": list(each.targets[0]),
                    "rejected_ids": list(each.targets[1]),
                    "ref_chosen_logps": float(theirs[0]),
                    "ref_rejected_logps": float(theirs[1]),
                }
                for each, theirs in zip(encoded.train, reference, strict=True)
            ]
        )


def measure(
    lm: LanguageModel, prompt: int, response: int, repeats: int, scratch: Path
) -> dict[str, Any]:
    """Return a row of the table."""
    encoded = made_up(lm, prompt, response)
    ours = Ours(lm, encoded)
    row: dict[str, Any] = {"prompt": prompt, "response": response, "loss": ours()}
    row |= {"trl_loss": None, "torch_threads": None}
    calls = {"jaxlm": ours}
    try:
        import torch

        peer = Peer(lm, encoded, ours.columns[REFERENCE], scratch / f"{prompt}-{response}")
        row |= {"trl_loss": peer(), "torch_threads": torch.get_num_threads()}
        calls["trl"] = peer
    except ImportError as missing:
        print(f"no rows of TRL, since {missing.name} is not installed (extra: parity)")
    times = common.interleaved(calls, repeats)
    row |= {"seconds": times["jaxlm"], "trl": times.get("trl")}
    row["ratio"] = times["jaxlm"] / times["trl"] if "trl" in times else None
    row["peak_MB"] = ours.program.peak_bytes / 1e6
    print(row, flush=True)  # each takes minutes with a real model
    return row


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id; the shipped model if not given")
    parser.add_argument("--quick", action="store_true", help="short pairs, two repeats")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    length = 32 if options.quick else 128
    with tempfile.TemporaryDirectory() as name:
        lm = from_pretrained(options.model)
        rows = [
            measure(
                lm, prompt, length - prompt, 2 if options.quick else options.repeats, Path(name)
            )
            for prompt in (length // 2, length // 4)
        ]
    common.print_table(rows)
    common.print_report("dpo_step", rows)


if __name__ == "__main__":
    main()
