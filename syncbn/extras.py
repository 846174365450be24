"""What the parts of syncbn need besides Python, and the extra of the package that brings it.

`import syncbn` needs nothing. Each part checks what it needs before it imports it, so that the
error names the command that installs it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec


def require(part: str, extra: str, *modules: str) -> None:
    """Check that modules are installed.

    Args:
        part: what needs them, as the error names it.
        extra: of this package (pyproject.toml), which installs them.
        modules: their import names.

    Raises:
        ModuleNotFoundError: some are not installed. The text names them and the extra.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise ModuleNotFoundError(
            f"{part} needs {', '.join(missing)}, which {are} not installed: "
            f"pip install 'syncbn[{extra}]'",
            name=missing[0],
        )


def require_for_command(command: str, extra: str, *modules: str) -> None:
    """Check the same for a command, which ends with one line on stderr and exit status 2."""
    try:
        require(command, extra, *modules)
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


@contextlib.contextmanager
def interruptible(command: str) -> Iterator[None]:
    """For the imports of a command: Ctrl-C ends them with one line on stderr and status 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
