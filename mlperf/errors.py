"""The error for a user's mistake, and its report on the command line."""

import functools
import sys
from typing import Any, Callable, TypeVar, cast  # noqa: UP035  # detection.engine.experiments runs on Python 3.8

Command = TypeVar("Command", bound=Callable[..., int])


class InputError(ValueError):
    """A user's mistake. The message says what is wrong, where, and what to do. `__main__` exits with 2."""


def report_errors(command: Command) -> Command:
    """Make a command print each line of an InputError, or the file of an OSError, and return exit status 2."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> int:
        try:
            return command(*args, **kwargs)
        except InputError as error:
            lines = str(error).splitlines()
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
            lines = [f"{problem}. Check the path, its permissions and its disk."]
        print("\n".join(f"error: {line}" for line in lines), file=sys.stderr)
        return 2

    return cast(Command, wrapper)
