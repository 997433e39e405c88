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
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jaxlm.cli import config as configs
from jaxlm.core.errors import UserError
from jaxlm.artifacts.processes import is_first


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
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    bits: Literal[8, 4] | None = None

    def __post_init__(self):
        for name in ("max_new_tokens", "num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give 1 or more.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}: give a number from 0 to 2**32 - 1.")
        if self.prompt and self.file:
            raise UserError("prompt and file are both given: give one.")
        if self.temperature == 0 and self.num_samples > 1:
            raise UserError("num_samples draws the same at temperature 0: give temperature.")
        if self.temperature == 0 and (self.top_k or self.top_p != 1 or self.min_p):
            raise UserError("top_k, top_p and min_p do nothing at temperature 0: give temperature.")
        self.sampling()

    def sampling(self) -> Any:
        """How tokens are drawn."""
        from jaxlm.models.generation import Sampling

        try:
            return Sampling(
                temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
            )
        except ValueError as error:
            raise UserError(f"{error}.") from None


def run(args: Sequence[str], mesh: Any = None) -> None:
    """The command `jaxlm generate`."""
    path, overrides = configs.parse_args(args)
    if path is not None and Path(path).suffix not in (".yaml", ".yml"):
        overrides.setdefault("model", path)
        path = None
    stop = overrides.pop("stop", None)
    config = configs.load(GenerateConfig, path, overrides)
    if stop is not None:
        config = replace(config, stop=_texts(stop))
    prompts = [config.prompt] if config.file is None else read_prompts(Path(config.file))
    alone = config.file is None and config.num_samples == 1 and not config.json
    try:
        if config.output is not None:
            _write(Path(config.output), completions(config, prompts, mesh))
        elif alone:
            stream(config, mesh)
        else:
            for line in completions(config, prompts, mesh):
                print(line, flush=True)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


def _texts(flag: str) -> tuple[str, ...]:
    """The texts of a JSON list, or the flag itself where it is none."""
    try:
        texts = json.loads(flag)
    except (json.JSONDecodeError, RecursionError):
        texts = None
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return tuple(texts)
    return (flag,)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: lines of text that are not blank, or the field "prompt" of JSONL."""
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"file {path} is neither .txt nor .jsonl: rename or convert it.")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8: save it as UTF-8.") from None
    numbered = [(i, line) for i, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"{path} is empty: give a file with at least one prompt.")
    if path.suffix == ".txt":
        return [line.removesuffix("\r") for _, line in numbered]
    return [_prompt(line, f"{path}, line {i}") for i, line in numbered]


def _prompt(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(
            f'{where} is no JSON object with a text "prompt": write {{"prompt": "..."}}.'
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
                yield json.dumps(row, ensure_ascii=False)


def stream(config: GenerateConfig, mesh: Any = None) -> None:
    """Prints the text after one prompt as it comes."""
    lm, options = _load(config, mesh)
    from jaxlm.evaluation import stream_text

    for piece in stream_text(lm, config.prompt, key=_key(config, 0), **options):
        print(piece, end="", flush=True)
    print()


def _load(config: GenerateConfig, mesh: Any) -> tuple[Any, dict[str, Any]]:
    """The model, and what `generate_text` and `stream_text` both take."""
    from jaxlm.train.run import load_model

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
        raise UserError(f"output {path} is there already: give a new file.")
    if not path.parent.is_dir():
        raise UserError(f"output {path}: there is no folder {path.parent}: make it.")
    first = next(lines)
    if not is_first():
        for _ in lines:  # all processes compute them
            pass
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        print(first, file=file)
        for line in lines:
            print(line, file=file, flush=True)
    temporary.replace(path)
