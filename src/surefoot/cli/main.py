"""`surefoot COMMAND ...`: exit code 0 done, 1 not proved, 2 the request made no sense, 130 stopped by Ctrl-C."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from surefoot._version import __version__
from surefoot.errors import InputError

COMMANDS = {
    "train": "train on a data set or your own model, write a run folder with report.html",
    "compare": "the same with several optimizers, side by side",
    "measure": "the constants of a run, or of your model and data",
    "tune": "suggest lr, gamma and delta for a run, from constants measured along its first steps",
    "certify": "prove that a run's weights are next to an exact global minimum, or say what is short",
    "report": "rebuild a run's report",
    "verify": "check a certificate file",
    "reproduce": "a paper's experiment, with tables, figures and a verdict beside its claim",
}
USAGE = "usage: surefoot COMMAND [options]\n\n" + "\n".join(f"  {name:9} {text}" for name, text in COMMANDS.items())
HELP = USAGE + "\n\nsurefoot COMMAND --help lists a command's options."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(HELP)
        return 0 if args else 2
    if args[0] == "--version":
        print(f"surefoot {__version__}")
        return 0
    if args[0] not in COMMANDS:
        print(f"surefoot: {args[0]!r} is not a command\n\n{HELP}", file=sys.stderr)
        return 2
    try:
        command: Callable[[list[str]], int] = import_module(f"surefoot.cli.{args[0]}").main
        return command(args[1:])
    except InputError as error:
        _let_main_speak()
        print(f"surefoot {args[0]}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in ("tyro", "rich", "pyarrow", "jinja2", "matplotlib", "tensorboard", "joblib"):
            raise
        print(f"surefoot {args[0]}: {error.name} is not installed; pip install 'surefoot[cli]'", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno is None:
            raise
        _let_main_speak()
        print(
            f"surefoot {args[0]}: {error.strerror}{f': {error.filename}' if error.filename else ''}; what was written "
            "before is whole: free some space and go on with --resume",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"surefoot {args[0]}: stopped", file=sys.stderr)
        return 130


def _launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _let_main_speak() -> None:
    """Wait on other ranks than 0: torchrun ends all as soon as one has ended, and rank 0 has the same to say."""
    if _launched() and os.environ["RANK"] != "0":
        time.sleep(10)


def _leave(code: int) -> NoReturn:
    """Exit; under torchrun at once: gloo's threads now and then abort an interpreter that is being torn down."""
    if _launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _leave(main())
