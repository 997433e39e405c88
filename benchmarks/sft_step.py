"""How long does a step of supervised fine-tuning take, compared with TRL?

usage: python -m benchmarks.sft_step [--data FOLDER] [--model smollm2] [--quick] [--repeats 5]

LoRA (rank 8, all matrices of the layers) and AdamW in float32 on conversations (FOLDER/train.jsonl,
from scripts/prepare_conversations.py, or else made up here) in the model's chat template, packed to
8 windows of 256 tokens: a step of jaxlm and one of `trl.SFTTrainer` on the same windows and the
same tokens in the loss, in turns. TRL runs without gradient checkpointing, and without telling the
rows of a window apart, which would cost it time. The loss is

  answers      on the assistant's turns
  all tokens   on every token

Two more rows, without TRL, have the loss on answers: with the base in 4 bits (QLoRA), and with
whole layers computed again in the backward pass (remat: layer).

The table has seconds, the ratio of times, the share of tokens in the loss, and the compiler's peak
memory for jaxlm. --quick has windows of 64 tokens. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import common
from jaxlm import from_pretrained
from jaxlm.data import EncodedRows, MessagesConfig
from jaxlm.models import LanguageModel, save_pretrained
from jaxlm.peft import LORA, lora
from jaxlm.train.losses import token_objective
from jaxlm.train.optimizers import Adam
from jaxlm.train.state import Program, many_steps, method

ROWS, RANK, RATE = 8, 8, 1e-4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def windows(lm: LanguageModel, file: Path, length: int) -> EncodedRows:
    """Return the conversations of a file, packed."""
    template = "plain" if lm.tokenizer.chat_template is None else "chat"
    config = MessagesConfig(
        train=str(file), template=template, max_length=length, packing=True, num_train=400
    )
    return config.load(seed=0).encode(lm)


def with_all(encoded: EncodedRows) -> EncodedRows:
    """Return the same windows with every token in the loss but the first of a row."""
    rows = [
        dataclasses.replace(
            row, loss_positions=tuple(i for i in range(len(row.ids)) if i not in row.starts)
        )
        for row in encoded.train.rows
    ]
    return dataclasses.replace(encoded, train=dataclasses.replace(encoded.train, rows=rows))


class Ours:
    """A step of jaxlm's trainer on one batch."""

    def __init__(self, lm: LanguageModel, batch: dict[str, np.ndarray]):
        adapted = lora(lm, jax.random.key(0), rank=RANK, targets="|".join(TARGETS))
        made = method(Adam(learning_rate=RATE, select=LORA), token_objective(adapted), 1000)
        self.batch = {key: value[None] for key, value in batch.items()}
        params = jax.tree.map(lambda x: x.copy(), adapted.params)
        self.state = made.start(params, jax.random.key(0))
        self.program = Program(many_steps(made.step), moves=True)

    def __call__(self) -> Any:
        self.state, info = self.program(self.state, self.batch)
        return info["loss"]


class Peer:
    """A step of `trl.SFTTrainer` on one batch."""

    def __init__(self, lm: LanguageModel, batch: dict[str, np.ndarray], folder: Path):
        import datasets
        import peft
        import transformers
        import trl

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        save_pretrained(lm, folder)
        columns: dict[str, list[Any]] = {"input_ids": [], "labels": []}
        for ids, mask, weights in zip(
            batch["input_ids"], batch["attention_mask"], batch["weights"], strict=True
        ):
            ids, weights = ids[mask > 0], weights[mask > 0]
            columns["input_ids"].append(ids.tolist())
            columns["labels"].append(np.where(weights > 0, ids, -100).tolist())
        args = trl.SFTConfig(
            output_dir=str(folder / "out"),
            per_device_train_batch_size=ROWS,
            max_length=batch["input_ids"].shape[1],
            gradient_checkpointing=False,
            learning_rate=RATE,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
        )
        trainer = trl.SFTTrainer(
            model=str(folder),
            args=args,
            train_dataset=datasets.Dataset.from_dict(columns),
            peft_config=peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=list(TARGETS)),
        )
        self.trainer, self.optimizer = trainer, trainer.create_optimizer()
        self.batch = next(iter(trainer.get_train_dataloader()))
        trainer.current_gradient_accumulation_steps = 1  # set by `train`, which this replaces

    def __call__(self) -> float:
        trainer = self.trainer
        trainer.model.train()
        loss = trainer.training_step(trainer.model, dict(self.batch))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def measure(
    what: str, lm: LanguageModel, encoded: EncodedRows, repeats: int, scratch: Path | None
) -> dict[str, Any]:
    """Return a row of the table; without a folder for TRL's model, TRL is not measured."""
    whole = encoded.batch(0, batch_size=ROWS, seed=0)
    ours = Ours(lm, encoded.sparse().batch(0, batch_size=ROWS, seed=0))
    share = float(whole["weights"].sum() / whole["attention_mask"].sum())
    row: dict[str, Any] = {"loss_on": what, "in_loss": share, "torch_threads": None}
    calls = {"jaxlm": ours}
    if scratch is not None:
        try:
            import torch

            calls["trl"] = Peer(lm, whole, scratch / what.replace(" ", "-"))
            row["torch_threads"] = torch.get_num_threads()
        except ImportError as missing:
            print(f"no rows of TRL, since {missing.name} is not installed (extra: parity)")
    times = common.interleaved(calls, repeats)
    row |= {"seconds": times["jaxlm"], "trl": times.get("trl")}
    row["ratio"] = times["jaxlm"] / times["trl"] if "trl" in times else None
    return row | {"peak_MB": ours.program.peak_bytes / 1e6}


def made_up(folder: Path) -> Path:
    """Write short conversations, and return their file."""
    numbers = np.random.default_rng(0)
    words = ["film", "story", "play", "book", "good", "bad", "long", "short"]
    rows = []
    for _ in range(200):
        said = [" ".join(numbers.choice(words, count)) for count in numbers.integers(2, 12, 2)]
        roles = zip(("user", "assistant"), said, strict=True)
        rows.append({"messages": [{"role": role, "content": text} for role, text in roles]})
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", help="folder or hub id; the shipped model if not given")
    parser.add_argument("--quick", action="store_true", help="short windows, two repeats")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        lm = from_pretrained(options.model)
        file = made_up(scratch) if options.data is None else options.data / "train.jsonl"
        encoded = windows(lm, file, 64 if options.quick else 256)
        repeats = 2 if options.quick else options.repeats
        rows = [
            measure(what, lm, made, repeats, scratch)
            for what, made in (("answers", encoded), ("all tokens", with_all(encoded)))
        ]
        again = lm.replace(config=lm.config.replace(remat="layer"))
        rows.append(measure("answers, remat: layer", again, encoded, repeats, None))
        few_bits = from_pretrained(options.model, bits=4)
        rows.append(measure("answers, base in 4 bits", few_bits, encoded, repeats, None))
    common.print_table(rows)
    common.print_report("sft_step", rows)


if __name__ == "__main__":
    main()
