"""Render chat templates in a separate process, with limits on time and memory.

A template is a program by whoever made the model. Jinja's sandbox keeps it from files and Python,
but not from endless loops or strings of gigabytes, and nothing inside a process can stop those: a
single product of a string and a number fills the memory. So a separate process renders, one request
per line, under limits of the operating system. It runs this file as a program, imports nothing
heavy, and stays for the next request.
"""

import contextlib
import datetime
import functools
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.core.errors import UserError

SECONDS = 5
"""Limit on the processor time for one text."""
MEMORY = 2**30
"""Limit on the address space of the process, in bytes."""
LENGTH = 2**24
"""Limit on the characters of one text."""

_lock = threading.Lock()
_worker: subprocess.Popen[str] | None = None


def render_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
) -> str:
    """Render messages with the tokenizer's chat template, as transformers does.

    A message has `role` and `content`. `add_generation_prompt` ends the text with the prompt for an
    answer.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("tokenizer: has no chat template (got none). Give a chat model.")
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # there are several, and none is the default
        raise UserError(
            f"tokenizer: has no default chat template ({str(error).splitlines()[0]}). Name one of "
            "them `default`."
        ) from None
    request = {
        "seconds": SECONDS,
        "template": template,
        "variables": {
            **tokenizer.special_tokens_map,
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        },
    }
    with _lock:
        answer = _ask(json.dumps(request))
    if "text" in answer:
        return answer["text"]
    raise UserError(f"chat template: {answer['problem']}. {answer['fix']}")


def _ask(line: str) -> dict[str, str]:
    """Return the answer of the process; start it if there is none."""
    global _worker
    if _worker is None or _worker.poll() is not None:
        stop()
        # `-P`: import nothing from the folder of this file or from the working directory.
        _worker = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
    answer = ""
    try:
        with contextlib.suppress(BrokenPipeError):
            print(line, file=_worker.stdin, flush=True)
            answer = _worker.stdout.readline()  # type: ignore[union-attr]
    finally:
        if not answer:  # also after Ctrl-C, or the next request would read this answer
            stop()
    if answer:
        return json.loads(answer)
    return {
        "problem": f"stopped, since it takes more than {SECONDS} seconds or too much memory",
        "fix": "Use another template.",
    }


def stop() -> None:
    """End the process, if there is one; the next text starts another."""
    global _worker
    if _worker is not None:
        _worker.kill()
        with contextlib.suppress(BrokenPipeError), _worker:  # closes the pipes and waits
            _worker = None


def _serve() -> None:
    """Answer requests, one line of JSON each, until there are no more."""
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the process that asks
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # not every system has both limits
            resource.setrlimit(kind, (most, most))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # The timer's signal ends the process, whatever it is doing.
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        answer = json.dumps(_answer(request))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)  # noqa: T201


def _answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        text = _compiled(request["template"]).render(**request["variables"])
    except MemoryError:
        text = None
    except Exception as error:  # a template is a program and may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problem = f"does not take the conversation ({reason[:200]})"
        return {"problem": problem, "fix": "Correct the messages, or use another template."}
    if text is None or len(text) > LENGTH:
        problem = f"writes more than {LENGTH} characters or takes more than {MEMORY >> 20} MiB"
        return {"problem": problem, "fix": "Use another template."}
    return {"text": text}


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """Compile a template, with the functions, filters and tags that transformers provides."""
    from jinja2 import TemplateError, ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """`{% generation %}` marks what the assistant writes; it is replaced by its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


if __name__ == "__main__":
    _serve()
