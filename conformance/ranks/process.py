"""What a layer may change in the process that it shares with the rank, and how it is put back.

Some changes can be undone, so that the next case does not see them. After others the rank must be
replaced. Both are reported. The random number generators are put back without a report, because to
draw a number is no fault.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Setting(NamedTuple):
    """A global setting.

    name: in words, for the report.
    get: returns the value; values are compared with ==.
    put: sets it; None if only a new process has the old value.
    """

    name: str
    get: Callable[[], Any]
    put: Callable[[Any], Any] | None = None


class Generator(NamedTuple):
    """A generator of random numbers: how its state is read and put back."""

    get: Callable[[], Any]
    put: Callable[[Any], Any]


@dataclass(frozen=True)
class Changes:
    """What has changed: all of it, and whether the rank must be replaced."""

    names: list[str]
    lasting: bool


class ProcessState:
    """The settings of this process as they are now.

    Args:
        settings: those of a framework.
        generators: those of a framework.
    """

    def __init__(
        self, settings: tuple[Setting, ...] = (), generators: tuple[Generator, ...] = ()
    ) -> None:
        self._settings = (*_SETTINGS, *settings)
        self._values = [setting.get() for setting in self._settings]
        self._states = [(one, one.get()) for one in (*_GENERATORS, *generators)]

    def restore(self) -> Changes:
        """Put back what has changed since."""
        names, lasting = [], False
        for setting, before in zip(self._settings, self._values, strict=True):
            try:
                if setting.get() == before:
                    continue
            except Exception:  # such as a working directory that was removed
                pass
            names.append(setting.name)
            if setting.put is not None:
                with contextlib.suppress(Exception):
                    setting.put(before)
            try:
                lasting = lasting or setting.get() != before
            except Exception:
                lasting = True
        for generator, state in self._states:
            generator.put(state)
        return Changes(names, lasting)


class Suite:
    """The names in the modules of the suite, and in its classes, as they are now."""

    def __init__(self) -> None:
        self._names = list(_names_of_suite())

    def patched(self) -> list[str]:
        """The names that stand for something else since."""
        return [
            f"{place}.{name}"
            for place, names, name, value in self._names
            if names.get(name) is not value
        ]


def _names_of_suite() -> Iterator[tuple[str, Mapping[str, Any], str, Any]]:
    """Module or class, its names, and each name with its value."""
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith(_OF_SUITE):
            continue
        for name, value in list(vars(module).items()):
            yield module_name, vars(module), name, value
            if isinstance(value, type) and value.__module__ == module_name:
                for attribute, of_class in vars(value).items():
                    if attribute not in _OWN_OF_CLASSES:
                        yield f"{module_name}.{name}", vars(value), attribute, of_class


_OF_SUITE = ("syncbn.conformance", "syncbn.launchers", "syncbn.reference")
_OWN_OF_CLASSES = ("__doc__", "__dict__", "__weakref__", "_abc_impl")


def _put_environment(environment: dict[str, str]) -> None:
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)


def _put_path(path: list[str]) -> None:
    sys.path[:] = path


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


_SETTINGS = (
    Setting("the environment", lambda: dict(os.environ), _put_environment),
    Setting("the working directory", os.getcwd, os.chdir),
    Setting("the umask", _umask, os.umask),
    Setting(
        "sys.path", lambda: list(sys.path), lambda path: sys.path.__setitem__(slice(None), path)
    ),
    Setting("the errors of NumPy", np.geterr, lambda errors: np.seterr(**errors)),
    Setting("stdout and stderr", lambda: (_is_open(1), _is_open(2))),
    Setting("the threads of Python", lambda: sorted(t.name for t in threading.enumerate())),
)

_GENERATORS = (
    Generator(random.getstate, random.setstate),
    Generator(np.random.get_state, np.random.set_state),  # what layers use
)
