"""The options of the command line for how ranks start, and the site that they describe."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Mapping

from syncbn.conformance import ConformanceError
from syncbn.conformance.document import MOST_RANKS
from syncbn.launchers import LAUNCHERS
from syncbn.launchers.site import LOOP_BACK, Site, SiteError

_RANKS = 4  # unless something else follows from the options

# Variables of each launcher in the processes that it starts: one that is always there, and the one
# with their number.
_STARTED_BY = {
    "torchrun": ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"),
    "msrun": ("MS_ROLE", "MS_WORKER_NUM"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "srun": ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"),
}


class SiteOptionsError(ConformanceError):
    """The options do not describe machines on which ranks can start. The message is one line."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of add_site, and those for the number of ranks."""
    parser.add_argument(
        "--ranks",
        type=number_of_ranks,
        metavar="N",
        help=f"the number of ranks on all nodes (default {_RANKS}, or nodes times ranks per node)",
    )
    parser.add_argument(
        "--ranks-per-node", type=number_of_ranks, metavar="M", help="the number of ranks on each"
    )
    add_site(parser)


def add_site(parser: argparse.ArgumentParser) -> None:
    """Add --launcher, --memory and the options that describe several machines."""
    parser.add_argument(
        "--launcher",
        default="local",
        choices=tuple(LAUNCHERS),
        help="what starts the ranks (default local)",
    )
    parser.add_argument(
        "--memory",
        type=_memory,
        metavar="GIB",
        help="the GiB of data that each rank may have on cpu (default its share of the machine's, "
        "and at least 2)",
    )
    parser.add_argument(
        "--nodes", type=number_of_ranks, default=1, metavar="N", help="the number of machines"
    )
    parser.add_argument(
        "--hosts",
        type=_hosts,
        default=(),
        metavar="HOST,HOST",
        help="the nodes, by names or addresses at which they reach each other; the first has "
        "rank 0 (default this machine)",
    )
    parser.add_argument(
        "--agent",
        type=_words,
        default=Site.agent,
        metavar="COMMAND",
        help="what runs a command on another host, with the arguments HOST COMMAND (default "
        f"'{shlex.join(Site.agent)}')",
    )
    parser.add_argument(
        "--listen",
        type=_address,
        default=(LOOP_BACK, 0),
        metavar="HOST:PORT",
        help="where the controller waits for ranks, on PORT and PORT + 1: an address that all "
        f"nodes reach (default {LOOP_BACK}:0, any two ports of this machine alone)",
    )


def complete(options: argparse.Namespace) -> None:
    """Set options.site and options.ranks from the other options.

    Raises:
        SiteOptionsError: see site_of; or ranks and nodes do not fit together.
    """
    if options.ranks_per_node is not None:
        product = options.nodes * options.ranks_per_node
        if options.ranks not in (None, product) or product > MOST_RANKS:
            raise SiteOptionsError(
                f"--ranks must be --nodes times --ranks-per-node, {product}, and at most "
                f"{MOST_RANKS}, got {options.ranks}"
            )
        options.ranks = product
    options.ranks = options.ranks or _RANKS
    options.site = site_of(options)
    try:
        options.site.ranks_per_node(options.ranks)
    except SiteError as error:
        raise SiteOptionsError(str(error)) from error


def site_of(options: argparse.Namespace) -> Site:
    """The site that the options of add_site describe.

    Raises:
        SiteOptionsError: they do not fit together, or a launcher has started this process several
            times.
    """
    _refuse_copies(os.environ)
    host, port = options.listen
    try:
        site = Site(options.nodes, options.hosts, options.agent, host, port)
        LAUNCHERS[options.launcher](site)
    except SiteError as error:
        raise SiteOptionsError(str(error)) from error
    return site


def _refuse_copies(environment: Mapping[str, str]) -> None:
    """One controller starts all ranks, so a launcher must not start several controllers.

    Raises:
        SiteOptionsError: one has.
    """
    for launcher, (always, number) in _STARTED_BY.items():
        count = environment.get(number, "1")
        if always in environment and count != "1":
            ours = {"srun": "slurm"}.get(launcher, launcher)
            instead = f" --launcher {ours}" if ours in LAUNCHERS else ""
            raise SiteOptionsError(
                f"{launcher} has started this command {count} times, but one controller starts "
                f"all ranks: run `syncbn-conformance ...{instead} --ranks {count}` once, without "
                f"{launcher}"
            )


def number_of_ranks(text: str) -> int:
    if not re.fullmatch("[0-9]{1,4}", text) or not 1 <= int(text) <= MOST_RANKS:
        raise argparse.ArgumentTypeError(f"must be an int from 1 to {MOST_RANKS}, got {text!r}")
    return int(text)


def _memory(text: str) -> int:
    """The bytes of a number of GiB."""
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) or not float(text):
        raise argparse.ArgumentTypeError(f"must be a positive number of GiB, got {text!r}")
    return int(float(text) * 2**30)


def _hosts(text: str) -> tuple[str, ...]:
    hosts = tuple(text.split(","))
    if wrong := [host for host in hosts if not re.fullmatch(r"\w[\w.-]*", host, re.ASCII)]:
        raise argparse.ArgumentTypeError(
            f"must be names or IPv4 addresses with commas, got {wrong[0]!r}"
        )
    return hosts


def _words(text: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be words for a shell: {error}") from error
    if not words:
        raise argparse.ArgumentTypeError("must name a program")
    return words


def _address(text: str) -> tuple[str, int]:
    found = re.fullmatch(r"(\w[\w.-]*):([0-9]{1,5})", text, re.ASCII)
    if not found or int(found[2]) > 65534:
        raise argparse.ArgumentTypeError(
            f"must be HOST:PORT, where HOST is a name or an IPv4 address and PORT is 0 to 65534, "
            f"got {text!r}"
        )
    return found[1], int(found[2])
