"""jaxlm: study and fine-tune language models by their gradients, or without them.

usage: jaxlm COMMAND [config.yaml] [--dotted.path=value ...]
"""

import importlib
import sys
from collections.abc import Sequence

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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, or 2 for a mistake that the user can fix."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    if debug:
        return _run(args, debug=True)
    try:
        return _run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return _mistake()
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return _mistake()
    except Exception as error:
        _end_if_alone(error)
        raise
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _mistake() -> int:
    """The exit code of a mistake; one process of several ends at once, since the others wait."""
    if "jax" in sys.modules:
        from jaxlm.artifacts.processes import distributed

        if distributed():
            from jaxlm.cli import launch

            launch.leave(2)
    return 2


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
        print(__doc__.strip(), "\n\ncommands:")
        for name, line in COMMANDS.items():
            print(f"  {name:<10}{line}")
        print("\n`jaxlm COMMAND --help` says more; --debug shows the traceback of an error.")
        print("`jaxlm help launch`: --mesh, several processes, traces.")
        return 0
    command, *rest = args
    if command == "--version":
        import jaxlm

        print(jaxlm.__version__)
        return 0
    if command not in COMMANDS:
        raise UserError(f"unknown command '{command}': choose one of {', '.join(COMMANDS)}.")
    module = importlib.import_module(f"jaxlm.cli.{command}")
    if "--help" in rest or "-h" in rest:
        print((module.__doc__ or "").strip())
        return 0
    from jaxlm.cli import launch

    flags, rest = launch.parse(rest)
    if flags == launch.Launch():
        module.run(rest)
        return 0
    if flags.supervised:
        return launch.supervise(flags, [*args, *(["--debug"] if debug else [])])
    if command in ALONE:
        raise UserError(
            f"{command} runs on one device of one process: leave out --mesh and others."
        )
    with flags.running() as mesh:
        module.run(rest, mesh=mesh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
