"""Chat templates, rendered where they can do no harm.

A template is a program of whoever made the model. Jinja's sandbox keeps it from files and Python,
but not from loops without end or texts of gigabytes, and nothing within a process can stop those:
one product of a text and a number fills the memory in a single instruction. So a process of its own
renders, under limits of processor time and memory of the operating system, one request a line. It
is this file, started as a program; it imports nothing heavy and stays for the next text.
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
"""Processor time of one text."""
MEMORY = 2**30
"""Address space of the process, in bytes."""
LENGTH = 2**24
"""Characters of one text."""

_lock = threading.Lock()
_worker: subprocess.Popen[str] | None = None


def render_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
) -> str:
    """The text of a conversation by the tokenizer's chat template, as transformers writes it.

    Args:
      tokenizer: of transformers.
      messages: each with `role` and `content`.
      add_generation_prompt: ends the text with what precedes an answer.

    Raises:
      UserError: there is no template, it is wrong or does not take the messages, or it needs more
        than `SECONDS`, `MEMORY` or `LENGTH`.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("tokenizer: has no chat template (got none). Give a chat model.")
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several by name, and none of them the default
        raise UserError(
            f"tokenizer: no chat template to choose ({str(error).splitlines()[0]}). Name one of "
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
    """The answer of the process, which is started where there is none."""
    global _worker
    if _worker is None or _worker.poll() is not None:
        stop()
        # `-P`: nothing is imported from the folder of this file, or from where the user stands.
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
        if not answer:  # after Ctrl-C too, since the next one would read this answer
            stop()
    if answer:
        return json.loads(answer)
    return {
        "problem": f"stopped, since it takes more than {SECONDS} seconds or too much memory",
        "fix": "Use another template.",
    }


def stop() -> None:
    """Ends the process, if there is one; the next text starts another."""
    global _worker
    if _worker is not None:
        _worker.kill()
        with contextlib.suppress(BrokenPipeError), _worker:  # closes the pipes and waits
            _worker = None


def _serve() -> None:
    """Answers requests, a line of JSON each, until there are no more."""
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # not every system can
            resource.setrlimit(kind, (most, most))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # The signal ends the process, whatever it does.
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        answer = json.dumps(_answer(request))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)  # noqa: T201


def _answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        text = _compiled(request["template"]).render(**request["variables"])
    except MemoryError:
        text = None
    except Exception as error:  # whatever the template, a program of its own, says
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problem = f"does not take the conversation ({reason[:200]})"
        return {"problem": problem, "fix": "Correct the messages, or use another template."}
    if text is None or len(text) > LENGTH:
        problem = f"writes more than {LENGTH} characters or takes more than {MEMORY >> 20} MiB"
        return {"problem": problem, "fix": "Use another template."}
    return {"text": text}


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """A template with the functions, filters and tags that those of transformers rely on."""
    from jinja2 import TemplateError, ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """`{% generation %}` marks what the assistant writes; here it is its content alone."""

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
