"""jaxlm: study and fine-tune language models by their gradients, or without them.

usage: jaxlm COMMAND [config.yaml] [--dotted.path=value ...]
"""

import contextlib
import errno
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from jaxlm.artifacts.folder import where_logged
from jaxlm.artifacts.stopping import Stopped, handle_signals
from jaxlm.cli import screen
from jaxlm.core.errors import UserError, out_of_memory

COMMANDS = {
    "finetune": "fine-tune a model on a task; without arguments, the quickstart",
    "sweep": "fine-tune over a grid and several seeds, and write one table",
    "study": "answer a question that takes many runs with a table and a picture",
    "evaluate": "measure the accuracy of a model on a task",
    "predict": "predict classes, completions or log-probabilities for the rows of a file",
    "generate": "generate text that continues a prompt",
    "pretrain": "train a causal language model from scratch on text",
    "convert": "load a model or a run folder and save it in the Hugging Face layout",
    "info": "print versions, devices, tasks, families, methods; with a model, its parameters",
}

USAGE = """\
`jaxlm COMMAND --help` lists every key of a command. Any command takes these flags:

  --print-config   print the whole configuration that the command would run, and stop
  --debug          show the traceback of an error
  --allow-code     let `task.read` name a function outside jaxlm, whose code then runs

`jaxlm --version` prints the version. `jaxlm help launch` describes --mesh, several processes and
traces."""

ALONE = ("convert", "info")
"""Commands that have nothing to divide over devices."""

DEBUG, ALLOW_CODE, PRINT_CONFIG = "--debug", "--allow-code", "--print-config"

PIPE = 141
"""Exit code if the reader of a pipe has ended, as with `| head`: that of SIGPIPE."""


def main(argv: Sequence[str] | None = None, *, script: str | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; None for those of this process.
        script: a file that registers its own methods and then calls this function. It is started
            in place of jaxlm where a command runs in several processes.

    Returns:
        The exit code: 0; 2 for a mistake that the user can fix; 1 for an unexpected error; 130 or
        143 if a signal stopped the command.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    screen.prepare()
    # Otherwise transformers warns at every start that PyTorch is missing; nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        code = _run(args, script)
        screen.flush()
        return code
    except Stopped as stopped:
        return _end(str(stopped), stopped.code)
    except KeyboardInterrupt:
        return _end("stopped", 130)
    except BrokenPipeError:
        screen.give_up()
        return PIPE
    except Exception as error:
        if DEBUG in args:
            raise
        sentence, code = foreseen(error), 2
        if sentence is None:
            _end_if_alone(error)
            sentence, code = _unforeseen(error), 1
        _end(f"error: {sentence}", code)
        return _leave_the_others(code)


def _run(args: list[str], script: str | None) -> int:
    if args == ["help", "launch"]:
        from jaxlm.cli import launch

        print((launch.__doc__ or "").strip())
        return 0
    everywhere = [word for word in args if word in (DEBUG, ALLOW_CODE)]
    args = [word for word in args if word not in everywhere]
    if not args or args[0] in ("-h", "--help", "help"):
        print((__doc__ or "").strip(), "\n\ncommands:")
        for name, line in COMMANDS.items():
            print(f"  {name:<10}{line}")
        print(f"\n{USAGE}")
        return 0
    command, *rest = args
    if command == "--version":
        import jaxlm

        print(jaxlm.__version__)
        return 0
    if command not in COMMANDS:
        raise UserError(
            f"command: is not known (got {command}). Choose one of {', '.join(COMMANDS)}."
        )
    module = importlib.import_module(f"jaxlm.cli.{command}")
    if "--help" in rest or "-h" in rest:
        print(_help(module, [word for word in rest if word not in ("-h", "--help")]))
        return 0
    if PRINT_CONFIG in rest:
        print(_resolved(module, [word for word in rest if word != PRINT_CONFIG]), end="")
        return 0
    from jaxlm.cli import launch

    flags, rest = launch.parse(rest)
    if flags.supervised:
        return launch.supervise(flags, [command, *rest, *everywhere], script)
    with contextlib.ExitStack() as stack:
        stack.enter_context(handle_signals())
        if ALLOW_CODE in everywhere:
            from jaxlm.data.readers import code_allowed

            stack.enter_context(code_allowed())
        if flags == launch.Launch():
            module.run(rest)
            return 0
        if command in ALONE:
            name, value = next(item for item in vars(flags).items() if item[1] is not None)
            raise UserError(
                f"{name}: is not for {command}, which runs on one device (got {value}). Leave it "
                "out."
            )
        module.run(rest, mesh=stack.enter_context(flags.running()))
    return 0


def _help(module: Any, args: list[str]) -> str:
    """Return what a command does, and every key of its configuration."""
    text = (module.__doc__ or "").strip()
    if hasattr(module, "described"):
        return f"{text}\n\n{module.described(args)}"
    if not hasattr(module, "config_class"):
        return text
    from jaxlm.artifacts.keys import listing

    return f"{text}\n\n{listing(module.config_class())}"


def _resolved(module: Any, args: list[str]) -> str:
    """Return the configuration that a command would run, as YAML with every key."""
    from jaxlm.cli import config as configs

    if hasattr(module, "read_config"):
        return configs.dump(module.read_config(args))
    if not hasattr(module, "config_class"):
        raise UserError(f"{PRINT_CONFIG}: needs a configuration (got none). Leave it out.")
    return configs.dump(configs.load(module.config_class(), *configs.parse_args(args)))


def foreseen(error: Exception) -> str | None:
    """Return the sentence for an error that the user can act on, or None for any other."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if (asked := out_of_memory(error)) is not None:
        return (
            f"memory: there is too little ({asked}). Lower batch_size, eval_batch_size or "
            "task.max_length, or take a smaller model; --dry-run of finetune and pretrain says "
            "what a run needs and the largest batch that fits."
        )
    if isinstance(error, UnicodeEncodeError):
        return (
            f"locale: the encoding {error.encoding} has no such characters (got "
            f"{error.object[error.start : error.end][:20]!a}). Set LC_ALL=C.UTF-8."
        )
    if _no_device(error):
        reason = " ".join(text.split())[:200] or "no device at all"
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return (
            f"JAX_PLATFORMS: there is no such device here (got {platforms!r}: {reason}). Unset it, "
            "or install jax for that device, such as pip install 'jaxlm[cuda12]'."
        )
    if isinstance(error, OSError):
        given = (error.filename, error.filename2)
        names = [os.fsdecode(name) for name in given if isinstance(name, str | bytes)]
        where = " -> ".join(names) or "a file or standard output"
        todo = {
            errno.ENOSPC: "Make room on that disk",
            errno.EDQUOT: "Make room in your quota",
            errno.EMFILE: "Raise the limit of open files: ulimit -n",
        }.get(error.errno or 0, "Give a path that exists, and that you may read or write")
        return f"{where}: {error.strerror or text or type(error).__name__}. {todo}."
    return None


def _no_device(error: Exception) -> bool:
    if isinstance(error, RuntimeError):
        return bool(re.search("Unable to initialize backend|nknown backend", str(error)))
    if isinstance(error, AssertionError) and "jax" in sys.modules:
        try:  # JAX fails without a message if no platform of JAX_PLATFORMS exists
            sys.modules["jax"].devices()
        except (AssertionError, RuntimeError):
            return True
    return False


def _unforeseen(error: Exception) -> str:
    """Return one line for an unexpected error, and where to read more."""
    lines = str(error).strip().splitlines()
    where = where_logged(error) or f"{DEBUG} shows the traceback."
    return (
        f"an error that jaxlm did not foresee ({type(error).__name__}: "
        f"{lines[0][:200] if lines else 'without a text'}). {where} Please report it."
    )


def _end(line: str, code: int) -> int:
    """Print the last message, even if a stream is closed, and return the exit code."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
    screen.give_up()
    return code


def _leave_the_others(code: int) -> int:
    """Return the exit code; one process of several ends here, so as not to wait for others."""
    if "jax" in sys.modules:
        from jaxlm.artifacts.processes import distributed

        if distributed():
            from jaxlm.cli import launch

            launch.leave(code)
    return code


def _end_if_alone(error: Exception) -> None:
    """Report and end if the computation failed because another process is gone."""
    import jax

    from jaxlm.artifacts.processes import distributed

    if isinstance(error, jax.errors.JaxRuntimeError) and distributed():
        from jaxlm.cli import launch

        launch.lost(str(error).splitlines()[0])


if __name__ == "__main__":
    sys.exit(main())
