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
from jaxlm.core.errors import UserError

COMMANDS = {
    "finetune": "fine-tune a model on a task; without arguments, the quickstart",
    "sweep": "fine-tune over a grid and several seeds, and write one table",
    "kernel": "say whether fine-tuning behaves like a kernel, in one table",
    "select": "choose training data that helps a target task, and train on it",
    "evaluate": "accuracy of a model, as it is, on a task",
    "generate": "text that a model writes after a prompt",
    "pretrain": "train a causal language model from scratch on text",
    "compare": "pretrain under several settings, and compare the curves",
    "convert": "load a model or a run folder and save it in the Hugging Face layout",
    "info": "versions, devices and memory; with a model, its parameter table",
}

ALONE = ("convert", "info")
"""Commands that have nothing to divide over devices."""

PRINT_CONFIG = "--print-config"
"""Flag of every command with a configuration: print it whole, and stop."""

PIPE = 141
"""Exit code where nobody reads on, such as before `| head`: that of a program that SIGPIPE ends."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        Its exit code: 0; 2 for a mistake that the user can fix; 1 for an error that nobody foresaw;
        130 or 143 where a signal stopped it.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    screen.prepare()
    # It would say at every start that PyTorch is not there, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        code = _run(args, debug=debug)
        screen.flush()
        return code
    except Stopped as stopped:
        return _say(str(stopped), stopped.code)
    except KeyboardInterrupt:
        return _say("stopped", 130)
    except BrokenPipeError:
        screen.give_up()
        return PIPE
    except Exception as error:
        if debug:
            raise
        sentence = foreseen(error)
        if sentence is None:
            _end_if_alone(error)
            _say(f"error: {_unforeseen(error)}", 1)
            return _mistake(1)
        _say(f"error: {sentence}", 2)
        return _mistake(2)


def foreseen(error: Exception) -> str | None:
    """What to say of an error that the user can do something about; None of any other."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        asked = re.search(r"\d[\d.]*\s?(?:[KMGTPE]i?B|bytes)", text)
        size = f"asked for {asked[0]} at once" if asked else "how much is not known"
        return (
            f"memory: there is too little ({size}). Lower batch_size, eval_batch_size or "
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
            "or install jax for that device: pip install 'jaxlm[cuda12]', say."
        )
    if isinstance(error, OSError):
        given = (error.filename, error.filename2)
        names = [os.fsdecode(name) for name in given if isinstance(name, str | bytes)]
        where = " -> ".join(names) or "a file or standard output"
        todo = {
            errno.ENOSPC: "Make room on that disk",
            errno.EDQUOT: "Make room in your quota",
            errno.EMFILE: "Raise the limit of open files: ulimit -n",
        }.get(error.errno or 0, "Give a path that is there, and that you may read or write")
        return f"{where}: {error.strerror or text or type(error).__name__}. {todo}."
    return None


def _no_device(error: Exception) -> bool:
    if isinstance(error, RuntimeError):
        return bool(re.search("Unable to initialize backend|nknown backend", str(error)))
    if isinstance(error, AssertionError) and "jax" in sys.modules:
        try:  # where no platform of JAX_PLATFORMS is there, JAX fails without a word
            sys.modules["jax"].devices()
        except (AssertionError, RuntimeError):
            return True
    return False


def _unforeseen(error: Exception) -> str:
    """One line of an error that nobody foresaw, and where to read more."""
    lines = str(error).strip().splitlines()
    where = where_logged(error) or "--debug shows the traceback."
    return (
        f"an error that jaxlm did not foresee ({type(error).__name__}: "
        f"{lines[0][:200] if lines else 'without a text'}). {where} Please report it."
    )


def _say(line: str, code: int) -> int:
    """Says the last sentence, if there is somebody to hear it."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
    screen.give_up()
    return code


def _mistake(code: int) -> int:
    """The exit code of a mistake; one process of several ends at once, since the others wait."""
    if "jax" in sys.modules:
        from jaxlm.artifacts.processes import distributed

        if distributed():
            from jaxlm.cli import launch

            launch.leave(code)
    return code


def _end_if_alone(error: Exception) -> None:
    """Where the computation failed since another process is gone, says so and ends."""
    import jax

    from jaxlm.artifacts.processes import distributed

    if isinstance(error, jax.errors.JaxRuntimeError) and distributed():
        from jaxlm.cli import launch

        launch.lost(str(error).splitlines()[0])


def _run(args: list[str], debug: bool = False) -> int:
    if args == ["help", "launch"]:
        from jaxlm.cli import launch

        print((launch.__doc__ or "").strip())
        return 0
    if not args or args[0] in ("-h", "--help", "help"):
        print((__doc__ or "").strip(), "\n\ncommands:")
        for name, line in COMMANDS.items():
            print(f"  {name:<10}{line}")
        print("\n`jaxlm COMMAND --help` lists every key; --print-config prints the configuration")
        print("that a command would run; --debug shows the traceback of an error.")
        print("`jaxlm help launch`: --mesh, several processes, traces.")
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
        print(_help(module))
        return 0
    from jaxlm.cli import launch

    if PRINT_CONFIG in rest:
        print(_resolved(module, [word for word in rest if word != PRINT_CONFIG]), end="")
        return 0
    flags, rest = launch.parse(rest)
    if flags.supervised:
        return launch.supervise(flags, [command, *rest, *(["--debug"] if debug else [])])
    with handle_signals():
        if flags == launch.Launch():
            module.run(rest)
            return 0
        if command in ALONE:
            name, value = next(item for item in vars(flags).items() if item[1] is not None)
            raise UserError(
                f"{name}: is not for {command}, which runs on one device (got {value}). Leave it "
                "out."
            )
        with flags.running() as mesh:
            module.run(rest, mesh=mesh)
    return 0


def _resolved(module: Any, args: list[str]) -> str:
    """Return the configuration that a command would run, as YAML with every key."""
    from jaxlm.cli import config as configs

    if hasattr(module, "read_config"):
        return configs.dump(module.read_config(args))
    if not hasattr(module, "config_class"):
        raise UserError(f"{PRINT_CONFIG}: needs a configuration (got none). Leave it out.")
    return configs.dump(configs.load(module.config_class(), *configs.parse_args(args)))


def _help(module: Any) -> str:
    """What a command does, and the keys of its configuration."""
    text = (module.__doc__ or "").strip()
    if not hasattr(module, "config_class"):
        return text
    from jaxlm.cli.keys import listing

    return f"{text}\n\n{listing(module.config_class())}"


if __name__ == "__main__":
    sys.exit(main())
