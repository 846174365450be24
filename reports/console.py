"""A console whose reader may leave."""

from __future__ import annotations

import os
import sys

from rich.console import Console


class PatientConsole(Console):
    """A rich console that goes quiet when its pipe is closed, as by `| head`, and does not exit."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with open(os.devnull, "w") as nothing:  # or the interpreter complains at its end
            os.dup2(nothing.fileno(), (sys.stderr if self.stderr else sys.stdout).fileno())
