r"""Text that a model writes after a prompt.

usage: jaxlm generate [MODEL] --prompt="the film is" [--temperature=1] [--name=value ...]
       jaxlm generate [MODEL] --file=prompts.txt [--output=completions.jsonl] [--name=value ...]

MODEL is a folder, a hub id, or the folder of a run of `jaxlm finetune`; left out, the model that
comes with jaxlm. One prompt is answered on the terminal as the text comes. With --file (a prompt a
line, or JSONL with a field "prompt"), several samples, --json=true or --output, each sample is a
line of JSON: index of the prompt, prompt, sample, text, finish ("stop" or "length"), token ids and
their log-probabilities under the model.

  --max_new_tokens=64   tokens of a sample
  --temperature=0       0 takes the most likely token; the filters need more
  --top_k=40            only the k most likely tokens
  --top_p=0.9           only the most likely tokens, up to this mass
  --min_p=0.1           only tokens at least p times as likely as the first
  --stop="###"          text that ends a sample; several, or a line's end, as a JSON list:
                        --stop='["###", "\n"]'
  --num_samples=1       samples of each prompt
  --seed=0              of the draws
  --batch_size=16       prompts in a forward pass; the draws depend on it
  --param_dtype=float32 or bfloat16
  --bits=8 or 4         matrices in that many bits
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jaxlm.artifacts.files import file_path, parse_json, read_text, report_write_errors, to_json
from jaxlm.artifacts.processes import is_main_process
from jaxlm.cli import config as configs
from jaxlm.core.checks import dtype_name, seeds, whole
from jaxlm.core.errors import UserError
from jaxlm.train.settings import MOST_ROWS, MOST_STEPS

MOST_BYTES = 2**28
"""Of a file of prompts, which is read whole."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """A generation; see the help of the command."""

    model: str | None = None
    prompt: str = ""
    file: str | None = None
    output: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    num_samples: int = 1
    seed: int = 0
    batch_size: int = 16
    json: bool = False
    param_dtype: str = "float32"
    bits: Literal[8, 4] | None = None

    def __post_init__(self):
        whole(self, "max_new_tokens", most=MOST_STEPS)
        whole(self, "num_samples", "batch_size", most=MOST_ROWS)
        seeds(self, "seed")
        object.__setattr__(self, "param_dtype", dtype_name(self.param_dtype))
        if self.prompt and self.file:
            raise UserError("file: is given beside prompt. Give one of them.")
        if self.temperature == 0 and self.num_samples > 1:
            raise UserError(
                f"num_samples: all are the same at temperature 0 (got {self.num_samples}). Give "
                "temperature."
            )
        for name, rest in (("top_k", None), ("top_p", 1.0), ("min_p", 0.0)):
            if self.temperature == 0 and (value := getattr(self, name)) != rest:
                raise UserError(
                    f"{name}: does nothing at temperature 0 (got {value}). Give temperature."
                )
        self.sampling()

    def sampling(self) -> Any:
        """How tokens are drawn."""
        from jaxlm.models.generation import Sampling

        return Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
        )


def config_class() -> type:
    """What a configuration of this command becomes."""
    return GenerateConfig


def run(args: Sequence[str], mesh: Any = None) -> None:
    """The command `jaxlm generate`."""
    path, overrides = configs.parse_model_args(args)
    stop = overrides.pop("stop", None)
    config = configs.load(GenerateConfig, path, overrides)
    if stop is not None:
        config = replace(config, stop=_texts(stop))
    file = None if config.file is None else file_path(config.file, "file")
    prompts = [config.prompt] if file is None else read_prompts(file)
    if config.output is not None:
        _write(file_path(config.output, "output"), completions(config, prompts, mesh))
    elif file is None and config.num_samples == 1 and not config.json:
        stream(config, mesh)
    else:
        for line in completions(config, prompts, mesh):
            print(line, flush=True)


def _texts(flag: str) -> tuple[str, ...]:
    """The texts of a JSON list, or the flag itself where it is none."""
    try:
        texts = json.loads(flag)
    except (ValueError, RecursionError):
        texts = None
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return tuple(texts)
    return (flag,)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: lines of text that are not blank, or the field "prompt" of JSONL."""
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"file: is neither .txt nor .jsonl (got {path}). Rename or convert it.")
    if not path.is_file():  # a pipe may never end
        raise UserError(f"file: there is no such file (got {path}). Give a file with prompts.")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"file: larger than {MOST_BYTES >> 20} MiB (got {path}). Split it.")
    lines = read_text(path).removeprefix("\ufeff").split("\n")
    numbered = [(i, line) for i, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"file: is empty (got {path}). Give a file with at least one prompt.")
    if path.suffix == ".txt":
        return [line.removesuffix("\r") for _, line in numbered]
    return [_prompt(line, f"{path}, line {i}") for i, line in numbered]


def _prompt(line: str, where: str) -> str:
    row = parse_json(line, where)
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(
            f'{where}: is no JSON object with a text "prompt". Write {{"prompt": "..."}}.'
        )
    return row["prompt"]


def completions(config: GenerateConfig, prompts: Sequence[str], mesh: Any = None) -> Iterator[str]:
    """A line of JSON for each sample, batch after batch."""
    lm, options = _load(config, mesh)
    from jaxlm.evaluation import generate_text

    for start in range(0, len(prompts), config.batch_size):
        batch = prompts[start : start + config.batch_size]
        key = _key(config, start)
        found = generate_text(lm, batch, key=key, num_samples=config.num_samples, **options)
        for i, (prompt, samples) in enumerate(zip(batch, found, strict=True), start=start):
            for j, sample in enumerate(samples):
                row = {
                    "index": i,
                    "prompt": prompt,
                    "sample": j,
                    "text": sample.text,
                    "finish": sample.finish,
                    "tokens": sample.tokens.tolist(),
                    "log_probs": [round(x, 5) for x in sample.log_probs.tolist()],
                }
                yield to_json(row)


def stream(config: GenerateConfig, mesh: Any = None) -> None:
    """Prints the text after one prompt as it comes."""
    lm, options = _load(config, mesh)
    from jaxlm.evaluation import stream_text

    for piece in stream_text(lm, config.prompt, key=_key(config, 0), **options):
        print(piece, end="", flush=True)
    print()


def _load(config: GenerateConfig, mesh: Any) -> tuple[Any, dict[str, Any]]:
    """The model, and what `generate_text` and `stream_text` both take."""
    from jaxlm.train.load import load_model

    lm = load_model(config.model, param_dtype=config.param_dtype, bits=config.bits, mesh=mesh)
    return lm, {
        "max_new_tokens": config.max_new_tokens,
        "sampling": config.sampling(),
        "stop": config.stop,
    }


def _key(config: GenerateConfig, first: int) -> Any:
    """The key of the batch that begins with this prompt."""
    import jax

    return jax.random.fold_in(jax.random.key(config.seed), first)


def _write(path: Path, lines: Iterator[str]) -> None:
    """Writes lines under a temporary name, from the first one on, and renames the file."""
    if path.exists():
        raise UserError(f"output: is there already (got {path}). Give a new file.")
    if not path.parent.is_dir():
        raise UserError(f"output: there is no folder {path.parent} (got {path}). Make it.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"output: {path.parent} cannot be written (got {path}). Choose another.")
    first = next(lines)
    if not is_main_process():
        for _ in lines:  # all processes compute them
            pass
        return
    # A name of its own, and a link, which takes no place that is taken: of two commands with one
    # output one writes it whole, and the other says that it is there.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with report_write_errors(path), temporary.open("w", encoding="utf-8") as file:
            print(first, file=file)
            for line in lines:
                print(line, file=file, flush=True)
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise UserError(f"output: is there already (got {path}). Give a new file.") from None
        except OSError:  # a file system without links
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
