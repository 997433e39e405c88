"""Generate text that continues a prompt.

usage: jaxlm generate [MODEL] --prompt="the film is" [--temperature=1] [--key=value ...]
       jaxlm generate [MODEL] --file=prompts.txt [--output=completions.jsonl] [--key=value ...]
       jaxlm generate [MODEL] --chat [--system="Be brief."] [--key=value ...]

MODEL is a folder, a hub id, or the folder of a run of `jaxlm finetune` or of a PEFT adapter; left
out, the model that comes with jaxlm. The text after one prompt is printed as it is generated. With
--file, several samples, --json=true or --output, each sample is a line of JSON: index of the
prompt, prompt, sample, text, finish ("stop" or "length"), token ids and their log-probabilities
under the model. --chat answers the lines of standard input, one after the other, until their end
(Ctrl-D).
"""

import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from jaxlm.artifacts.files import file_path, parse_json, read_text, to_json, write_new
from jaxlm.artifacts.processes import is_main_process
from jaxlm.cli import config as configs
from jaxlm.core.checks import dtype_name, seeds, show, whole
from jaxlm.core.errors import UserError
from jaxlm.data.messages import Message, messages_of, prompt_of
from jaxlm.data.rows import tokenizer_of
from jaxlm.data.sources import Record
from jaxlm.train.settings import MOST_ROWS, MOST_STEPS

MOST_BYTES = 2**28
"""Size limit of a file of prompts, which is read whole."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    r"""A generation.

    Attributes:
        model: folder or hub id; null means the model that comes with the package.
        base: where the model is that a run or an adapter began with, if it has moved.
        prompt: text to continue.
        file: prompts instead: a line each in .txt, or each row of .jsonl: its field "prompt", or
            "messages", which the assistant answers.
        chat: answer the lines of standard input as a conversation.
        system: what the system says before the conversation.
        template: how conversations are written, see `jaxlm.data.MessagesConfig`.
        output: new file for the lines of JSON.
        max_new_tokens: tokens of a sample.
        temperature: 0 takes the most likely token; top_k, top_p and min_p need a higher one.
        top_k: keep only the k most likely tokens.
        top_p: keep only the most likely tokens up to this probability.
        min_p: keep only tokens at least this many times as likely as the most likely one.
        stop: text that ends a sample, or a list of such texts, as in --stop='["###", "\n"]'.
        num_samples: samples of each prompt.
        seed: seed of the draws.
        batch_size: prompts in a forward pass; the samples depend on it.
        json: whether to print lines of JSON for one prompt too.
        param_dtype: dtype of the parameters, float32 or bfloat16.
        bits: 8 or 4 keeps matrices in that many bits.
    """

    model: str | None = None
    base: str | None = None
    prompt: str = ""
    file: str | None = None
    chat: bool = False
    system: str = ""
    template: Literal["chat", "tulu", "plain"] = "chat"
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
            raise UserError("file: replaces prompt (got both). Give one of them.")
        for name in ("prompt", "file", "output"):
            if self.chat and (value := getattr(self, name)):
                raise UserError(
                    f"chat: reads standard input and writes to standard output (got {name}={value}"
                    "). Give one of them."
                )
        if self.system and not self.chat:
            raise UserError(f"system: belongs to a chat (got {show(self.system)}). Give chat too.")
        idle = {"num_samples": 1, "top_k": None, "top_p": 1.0, "min_p": 0.0}
        for name, default in idle.items():
            if self.temperature == 0 and (value := getattr(self, name)) != default:
                raise UserError(
                    f"{name}: has no effect at temperature 0 (got {value}). Give temperature."
                )
        self.sampling()

    def sampling(self) -> Any:
        """Return how tokens are drawn."""
        from jaxlm.models.generation import Sampling

        return Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
        )


def config_class() -> type:
    """Return the class of this command's configuration."""
    return GenerateConfig


def read_config(args: Sequence[str]) -> GenerateConfig:
    """Return the configuration that the arguments give."""
    switches = {"--chat", "--json"}
    words = [
        f"{word}=true" if word in switches and after not in ("true", "false") else word
        for word, after in zip(args, [*args[1:], ""], strict=True)
    ]
    path, flags = configs.parse_model_args(words)
    if not (stop := flags.get("stop", "[")).startswith("["):
        flags["stop"] = json.dumps([stop])
    return configs.load(GenerateConfig, path, flags)


def generate(
    config: GenerateConfig | str | Path | None = None,
    *,
    mesh: Mesh | None = None,
    **overrides: Any,
) -> list[dict[str, Any]]:
    """Generate text, as the command `jaxlm generate` does.

    Args:
        config: a configuration, its YAML file, or a model: a folder, a hub id, the folder of a run.
        mesh: see `jaxlm.sharding.make_mesh`; None for one device.
        **overrides: keys of `GenerateConfig`; see `jaxlm.finetune`.

    Returns:
        A record for each sample, with the keys that the command writes with `--json`: index,
        prompt, sample, text, finish, tokens and log_probs.

    Raises:
        UserError: a key is unknown, a value does not fit, or `output` exists.
    """
    if isinstance(config, str | Path) and not configs.is_file(config):
        config, overrides = None, {**overrides, "model": config}
    if isinstance(stop := overrides.get("stop"), str):
        overrides = {**overrides, "stop": [stop]}
    built, _ = configs.from_call(GenerateConfig, config, overrides, "generate")
    samples, kept = itertools.tee(_samples(built, mesh))
    if built.output is not None:
        write_samples(file_path(built.output, "output"), map(to_json, samples))
    return list(kept)


def run(args: Sequence[str], mesh: Any = None) -> None:
    """Run the command `jaxlm generate`."""
    config = read_config(args)
    if config.chat:
        _chat(config, mesh)
    elif config.output is not None:
        generate(config, mesh=mesh)
    elif config.file is not None or config.num_samples > 1 or config.json:
        for row in _samples(config, mesh):
            print(to_json(row), flush=True)
    else:
        from jaxlm.evaluation import stream_text

        lm, options = _load(config, mesh)
        for piece in stream_text(lm, config.prompt, key=_batch_key(config, 0), **options):
            print(piece, end="", flush=True)
        print()


def _chat(config: GenerateConfig, mesh: Any) -> None:
    """Answer the lines of standard input, each with all before it."""
    from jaxlm.evaluation import stream_text

    lm, options = _load(config, mesh)
    tokenizer = tokenizer_of(lm)
    ends = () if tokenizer.eos_token is None else (tokenizer.eos_token,)
    options["stop"] = (*config.stop, *ends)  # so that the token's name is not printed
    messages = [Message("system", config.system)] if config.system else []
    for turn, line in enumerate(_lines()):
        messages.append(Message("user", line))
        prompt, answer = prompt_of(messages, tokenizer, config.template), ""
        for piece in stream_text(lm, prompt, key=_batch_key(config, turn), **options):
            print(piece, end="", flush=True)
            answer += piece
        print(flush=True)
        messages.append(Message("assistant", answer))


def _lines() -> Iterator[str]:
    """Yield the lines of standard input that are not blank, until its end."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _samples(config: GenerateConfig, mesh: Mesh | None) -> Iterator[dict[str, Any]]:
    """Yield a record for each sample, batch by batch."""
    given: Sequence[str | tuple[Message, ...]] = [config.prompt]
    if config.file is not None:
        given = read_prompts(file_path(config.file, "file"))
    lm, options = _load(config, mesh)
    prompts = [prompt_of(each, tokenizer_of(lm), config.template) for each in given]
    from jaxlm.evaluation import generate_text

    for start in range(0, len(prompts), config.batch_size):
        batch, key = prompts[start : start + config.batch_size], _batch_key(config, start)
        results = generate_text(lm, batch, key=key, num_samples=config.num_samples, **options)
        for i, (prompt, samples) in enumerate(zip(batch, results, strict=True), start=start):
            if not isinstance(prompt, str):
                prompt = tokenizer_of(lm).decode(prompt)
            for j, sample in enumerate(samples):
                yield {
                    "index": i,
                    "prompt": prompt,
                    "sample": j,
                    "text": sample.text,
                    "finish": sample.finish,
                    "tokens": sample.tokens.tolist(),
                    "log_probs": [round(x, 5) for x in sample.log_probs.tolist()],
                }


def read_prompts(path: Path) -> list[str | tuple[Message, ...]]:
    """Return the non-blank lines of a file, or the fields `prompt` or `messages` of its rows."""
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
    prompts: list[str | tuple[Message, ...]] = []
    for i, line in numbered:
        row = parse_json(line, where := f"{path}, line {i}")
        if isinstance(row, dict) and "messages" in row:
            prompts.append(messages_of(Record(row, str(path), i, "line")))
            continue
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UserError(
                f'{where}: has no text "prompt" (got {show(line)}). Write {{"prompt": "..."}}.'
            )
        prompts.append(row["prompt"])
    return prompts


def check_new(path: Path, key: str) -> None:
    """Refuse the value of the option `key` if a new file cannot be written there."""
    if path.exists():
        raise UserError(f"{key}: exists already (got {path}). Give a new file.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{key}: its folder cannot be written (got {path}). Choose another.")


def write_samples(path: Path, lines: Iterable[str], key: str = "output") -> None:
    """Write lines to a file that must not exist yet, whole or not at all."""
    check_new(path, key)
    text = "".join(f"{line}\n" for line in lines)  # all processes must take part in computing them
    if not is_main_process():
        return
    try:
        write_new(path, text)
    except FileExistsError:  # another command was faster
        check_new(path, key)
        raise


def _load(config: GenerateConfig, mesh: Any) -> tuple[Any, dict[str, Any]]:
    """Return the model, and the options that `generate_text` and `stream_text` share."""
    from jaxlm.train.load import load_model

    given: dict[str, Any] = {"param_dtype": config.param_dtype, "bits": config.bits}
    lm = load_model(config.model, base=config.base, **given, mesh=mesh)
    options = {"max_new_tokens": config.max_new_tokens, "sampling": config.sampling()}
    return lm, options | {"stop": config.stop}


def _batch_key(config: GenerateConfig, first: int) -> Any:
    """Return the PRNG key of the batch whose first prompt has the index `first`."""
    import jax

    return jax.random.fold_in(jax.random.key(config.seed), first)
