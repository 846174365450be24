"""A pool of rank processes that outlive their cases, driven by one controller.

Ranks connect to the controller (syncbn.launchers.handshake). Every message carries an epoch; an
answer to an older epoch is dropped. A rank that dies, that sends what is no message, that exceeds
the deadline, or that does not answer after a peer failed costs one case: the controller dumps the
stacks, kills all ranks, and starts new ones for the next case. If every rank survives an error, the
ranks stay and form a new world, because a process group is not reliable after an error.
"""

from __future__ import annotations

import itertools
import os
import selectors
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import syncbn
from syncbn.conformance.activity import Activity
from syncbn.conformance.case import Case
from syncbn.conformance.frameworks import FRAMEWORKS
from syncbn.conformance.targets import Target, TargetError
from syncbn.conformance.wire import Channel, Message
from syncbn.launchers import LAUNCHERS, Job, Launcher
from syncbn.launchers.handshake import Reception
from syncbn.launchers.link import WireError
from syncbn.launchers.site import Site

HERE = Site()  # this machine alone

_START_SECONDS = 120.0  # importing a framework on a busy machine takes a while
_JOIN_SECONDS = 20.0  # in which ranks that have all loaded form a new world
_GRACE_SECONDS = 5.0  # in which the peers of a rank that failed must fail as well
_TRIPS = 25.0  # round trips that a step may take over a slow link, its lost packets included
_STOPPED_SECONDS = 1.0  # longer than this process is between two looks unless something stops it
_PATIENCE = 10.0  # factor of all times if ranks compile their steps, or interpret their kernels
_MAX_FAILED_STARTS = 2  # in a row; after that every case is an error at once
_IDLE_SECONDS = 1.0  # after which ranks that wait for each other hang, if nothing runs
_MIN_BUSY_SECONDS = 5.0  # of processor time that a thread may always use
_BUSY_SHARE = 0.25  # of a deadline that a thread may use of a processor
_MIN_MEMORY = 2 << 30  # bytes
_SEND_SECONDS = 5.0  # in which a rank must take a message
_PAUSE_SECONDS = 0.2  # between looks at the processes
_END_SECONDS = 2.0  # between the end of a connection and that of its process
_STACK_SECONDS = 0.3  # in which a signal handler writes


@dataclass(frozen=True)
class Outcome:
    """The answers of the ranks to one message.

    answers: by rank; None for a rank that did not answer.
    crashed: the ranks that died.
    hung: the ranks that did not answer in time.
    details: what is known about crashes and hangs; empty if there is none.
    error: why the suite or the machine could not run the case; empty if it could.
    changed: what the layer changed in the processes of the ranks, by rank.
    """

    answers: list[Message | None]
    crashed: list[int] = field(default_factory=list)
    hung: list[int] = field(default_factory=list)
    details: str = ""
    error: str = ""
    changed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Restart:
    """Ranks that were replaced.

    case: the id of the case that was about to run, or had just run.
    reason: what the old ranks did.
    seconds: how long they kept the run waiting.
    """

    case: str
    reason: str
    seconds: float


@dataclass
class _Sent:
    """A message that was sent to ranks.

    waiting: the ranks that have it and have not answered, with their channels.
    stuck: the ranks that did not take it.
    gone: the ranks whose processes had ended.
    """

    waiting: dict[int, Channel]
    stuck: list[int] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)


class StartError(TargetError):
    """The ranks cannot be started, load the target or form a world."""


class RankPool:
    """`ranks` processes that run cases on one target. Use it as a context manager.

    Args:
        target: the layer to run.
        ranks: the number of processes, at least 1.
        launcher: a name of syncbn.launchers.LAUNCHERS.
        memory: the bytes of data that each rank may have on CPU; None for its share of the
            machine's memory.
        site: the machines on which the launcher starts ranks.

    Raises:
        SiteError: the launcher cannot start so many ranks on these machines.

    `starts` counts how often processes were started, and `restarts` has the reason of each start
    after the first. `hangs` counts the cases that hung. `versions` names the software of the ranks.
    """

    def __init__(
        self,
        target: Target,
        ranks: int,
        launcher: str = "local",
        memory: int | None = None,
        site: Site = HERE,
    ) -> None:
        self.target = target
        self.ranks = ranks
        self.launcher = launcher
        # A driver of an accelerator reserves far more than it uses.
        share = _share_of_memory(site.ranks_per_node(ranks))
        self.memory = 0 if target.device != "cpu" else memory or share
        self.site = site
        self.versions: dict[str, str] = {}
        self.starts = 0
        self.restarts: list[Restart] = []
        self.hangs = 0
        self._failed_starts = 0  # in a row
        self._epoch = 0
        self._launcher: Launcher = LAUNCHERS[launcher](site)
        self._job: Job | None = None
        self._channels: list[Channel] = []
        self._hosts: list[str] = []  # by rank, if there are several
        self._must_rejoin = False

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the ranks, load the target and form the world.

        Raises:
            StartError: the ranks do not start, or the target cannot be loaded. The text has the
                rank's own message.
        """
        self.starts += 1
        command = [sys.executable, "-m", "syncbn.conformance.ranks.worker"]
        try:
            with Reception(
                self.ranks, self._launcher.secret, self.site.listen, self.site.port
            ) as reception:
                environment = self._environment() | {"SYNCBN_CONTROLLER": reception.address}
                self._job = self._launcher.start(command, self.ranks, environment, self._preload())
                self._channels = self._receive_ranks(reception)
            loaded = self._all({"do": "load", "target": self.target.document}, _START_SECONDS)
            self.versions = _same_versions(loaded)
            hosts = [answer.content["host"] for answer in loaded]
            self._hosts = hosts if len(set(hosts)) > 1 else []
            self._join(_START_SECONDS)
        except OSError as error:
            self.close()
            raise StartError(str(error)) from error
        except BaseException:
            self.close()
            raise

    def plan(self) -> list[tuple[str, str]]:
        """Each host, and the command line that `start` would run there."""
        return self._launcher.plan(self.ranks, self._environment())

    def _environment(self) -> dict[str, str]:
        """What is added to the environment of the ranks. It may stand on a command line."""
        root = str(
            Path(syncbn.__file__).resolve().parent.parent
        )  # so that ranks import the same suite
        return {
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
            "SYNCBN_MEMORY": str(self.memory),
            **FRAMEWORKS[self.target.framework].missing_environment(),
        }

    def stop(self) -> None:
        """End all ranks. The pool starts again with the next case."""
        for channel in self._channels:
            channel.close()
        self._channels = []
        self._must_rejoin = False
        if self._job is not None:
            self._job.stop()
            self._job = None

    def close(self) -> None:
        """End all ranks, and what starts them."""
        self.stop()
        self._launcher.close()

    def run(self, case: Case) -> Outcome:
        """Run a case on all ranks. No target can make this raise."""
        return self.begin(case)()

    def begin(self, case: Case) -> Callable[[], Outcome]:
        """Give a case to all ranks. No target can make this raise.

        Returns:
            A function that waits for the answers, from now on for as long as the case may take. It
            must be called before the pool does anything else.
        """
        try:
            self._prepare(case)
        except StartError as error:
            outcome = Outcome([None] * self.ranks, error=str(error))
            return lambda: outcome
        began = time.monotonic()
        sent = self._send({"do": "run", "case": case.document})
        return lambda: self._finish(case, sent, began)

    def _finish(self, case: Case, sent: _Sent, began: float) -> Outcome:
        steps = sum(step.repeat for step in case.steps)
        outcome = self._wait(
            sent,
            case.deadline + steps * self._step_on_the_way(),
            _patience(self.target),
            watch=self.target.device == "cpu",
        )
        assert self._job is not None
        if (outcome.crashed or outcome.hung) and (failure := self._job.failure()):
            outcome = replace(outcome, error=failure)
        elif outcome.hung:
            self.hangs += 1
        if outcome.crashed or outcome.hung:
            if outcome.error:
                self.close()
            else:
                self.stop()
            self._record(case, outcome.details, began)
        elif lasting := _changed(outcome, "lasting"):
            self.stop()
            self._record(case, f"the layer changed its process: {'; '.join(lasting)}", began)
        else:
            self._must_rejoin = any(went_wrong(answer) for answer in outcome.answers)
        return replace(outcome, changed=_changed(outcome, "changed"))

    def sources(self) -> dict[str, Any]:
        """The files of the layer that rank 0 has loaded: syncbn.conformance.ranks.sources.

        Raises:
            StartError: no rank can answer.
        """
        if self._job is None:
            self.start()
        found: dict[str, Any] = self._all({"do": "sources"}, _START_SECONDS, [0])[0].content
        return found["sources"]

    def _prepare(self, case: Case) -> None:
        """Have ranks that are in one world.

        Raises:
            StartError: that is not possible.
        """
        if self._must_rejoin:
            began = time.monotonic()
            try:
                on_the_way = self.ranks * self._step_on_the_way()
                self._join((_JOIN_SECONDS + on_the_way) * _patience(self.target))
            except StartError as error:
                self.stop()
                self._record(case, f"the ranks did not form a new world: {error}", began)
        if self._job is None:
            if self._failed_starts == _MAX_FAILED_STARTS:
                raise StartError(f"the ranks failed to start {_MAX_FAILED_STARTS} times in a row")
            self._failed_starts += 1
            self.start()
            self._failed_starts = 0

    def _step_on_the_way(self) -> float:
        """The seconds that messages of a step may be on the way, as far as the controller sees."""
        return _TRIPS * max(channel.round_trip() for channel in self._channels)

    def _record(self, case: Case, reason: str, began: float) -> None:
        self.restarts.append(Restart(case.id, reason, time.monotonic() - began))

    def _preload(self) -> tuple[str, ...]:
        """The modules that the ranks may share.

        None if kernels are interpreted: Triton reads that wish when it is imported, which some of
        these modules do.
        """
        interpreted = self.target.rung == "interpreted"
        return () if interpreted else FRAMEWORKS[self.target.framework].preload

    def _receive_ranks(self, reception: Reception) -> list[Channel]:
        """One channel for each rank, in rank order; they may connect in any order."""

        def look(missing: set[int]) -> None:
            assert self._job is not None
            if lost := sorted(missing & set(self._job.ended())):
                raise StartError(self._lost(lost, "died at its start"))

        links = reception.gather(_START_SECONDS, look)
        if missing := sorted(set(range(self.ranks)) - set(links)):
            for link in links.values():
                link.close()
            raise StartError(self._lost(missing, "did not start"))
        return [Channel(links[rank]) for rank in range(self.ranks)]

    def _join(self, deadline: float) -> None:
        """Let the ranks form a new world."""
        port = self._all({"do": "host"}, deadline, only=[0])[0].content["port"]
        self._all({"do": "join", "port": port}, deadline)
        self._must_rejoin = False

    def _all(
        self, content: dict[str, Any], deadline: float, only: list[int] | None = None
    ) -> list[Message]:
        """The answers to a message that must succeed on all ranks (or on those in `only`)."""
        outcome = self._wait(self._send(content, only), deadline)
        if outcome.crashed or outcome.hung:
            raise StartError(outcome.details)
        answers = [answer for answer in outcome.answers if answer is not None]
        for answer in answers:
            if "failed" in answer.content:
                raise StartError(
                    f"target {self.target.name} cannot be used: {answer.content['failed']}"
                )
        return answers

    def _send(self, content: dict[str, Any], only: list[int] | None = None) -> _Sent:
        """Send a message to all ranks, or to those in `only`."""
        self._epoch += 1
        receivers = range(self.ranks) if only is None else only
        sent = _Sent({rank: self._channels[rank] for rank in receivers})
        for rank, channel in list(sent.waiting.items()):
            try:
                channel.send(content | {"epoch": self._epoch}, seconds=_SEND_SECONDS)
            except TimeoutError:
                sent.stuck.append(rank)
                del sent.waiting[rank]
            except OSError:
                sent.gone.append(rank)
                del sent.waiting[rank]
        return sent

    def _wait(
        self, sent: _Sent, deadline: float, patience: float = 1.0, watch: bool = False
    ) -> Outcome:
        """Wait for the answers to a message.

        Args:
            sent: the message.
            deadline: how long to wait, in seconds.
            patience: a factor of all times.
            watch: whether the wait also ends if all ranks sleep, or if one computes for too long.
        """
        waiting = sent.waiting
        answers: list[Message | None] = [None] * self.ranks
        # By rank, what it sent if that was no message.
        crashed: dict[int, str] = dict.fromkeys(sent.gone, "")
        grace = (_GRACE_SECONDS + self._step_on_the_way()) * patience
        end = time.monotonic() + (grace if crashed or sent.stuck else deadline * patience)
        activity: Activity | None = None
        queued = 0.0  # seconds in which the ranks waited for a processor: no fault of the layer
        why = "did not answer in time"
        with selectors.DefaultSelector() as selector:
            for rank, channel in waiting.items():
                selector.register(channel, selectors.EVENT_READ, rank)
            looked = time.monotonic()
            while waiting:
                now = time.monotonic()
                if (stopped := now - looked - _STOPPED_SECONDS) > 0:
                    end += stopped  # answers may have come that nothing has read
                    if activity is not None:
                        activity.wake()
                looked = now
                if (left := end + queued - now) <= 0:
                    break
                ready = [key.data for key, _ in selector.select(min(left, _PAUSE_SECONDS))]
                if watch and activity is None and not ready:
                    assert self._job is not None
                    activity = self._activity_of_all()
                    watch = activity is not None
                if activity is not None and ready:
                    activity.wake()
                if activity is not None and (stuck_why := _stuck(activity, deadline, patience)):
                    why = stuck_why
                    break
                queued = 0.0 if activity is None else activity.queued_seconds()
                for rank in ready or self._ended_of(waiting):
                    try:
                        answer = self._answer(waiting[rank], dead=not ready)
                    except (EOFError, OSError, WireError) as error:
                        crashed[rank] = str(error) if isinstance(error, WireError) else ""
                        end = min(end, time.monotonic() + grace)
                    else:
                        if answer is None:
                            continue
                        answers[rank] = answer
                        if went_wrong(answer):
                            end = min(end, time.monotonic() + grace)
                    selector.unregister(waiting.pop(rank))
        hung = sorted([*waiting, *sent.stuck])
        return Outcome(answers, sorted(crashed), hung, self._explain(crashed, hung, why, answers))

    def _activity_of_all(self) -> Activity | None:
        """None if ranks are on other machines: what those do is not seen here."""
        assert self._job is not None
        pids = self._job.processes()
        return Activity(pids.values()) if len(pids) == self.ranks else None

    def _ended_of(self, waiting: dict[int, Channel]) -> list[int]:
        """The ranks that have ended. Their connections stay open in children that they forked."""
        assert self._job is not None
        return sorted(set(waiting) & set(self._job.ended()))

    def _answer(self, channel: Channel, dead: bool) -> Message | None:
        """The answer to the current message; None if it has not arrived yet.

        Raises:
            WireError: what arrived is no answer.
            EOFError, OSError: the rank is gone.
        """
        while (message := channel.arrived()) is not None:
            epoch = message.content.get("epoch")
            if epoch == self._epoch:
                return message
            if type(epoch) is not int or epoch > self._epoch:
                raise WireError(f"an answer must have the epoch {self._epoch}, got {epoch!r}"[:200])
        if dead:
            raise EOFError("the process has ended")
        return None

    def _explain(
        self, crashed: dict[int, str], hung: list[int], why: str, answers: list[Message | None]
    ) -> str:
        if not crashed and not hung:
            return ""
        assert self._job is not None
        if hung:
            self._job.dump_stacks()
            time.sleep(_STACK_SECONDS)
        parts = [
            f"{self._named([rank])} sent what is no message: {sent}"
            if sent
            else self._lost([rank], "died")
            for rank, sent in sorted(crashed.items())
        ]
        parts += [self._lost([rank], why) for rank in hung]
        for rank, answer in enumerate(answers):
            for error in _errors(answer):
                parts.append(f"{self._named([rank])} raised {error}")
        return "; ".join(parts)

    def _lost(self, ranks: list[int], how: str) -> str:
        """What happened to ranks: how their processes ended, and where they were."""
        assert self._job is not None
        ended = self._how_ended(ranks) if "died" in how else set()
        output = "\n".join(self._job.output(rank) for rank in ranks)
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        shown = [*sorted(ended), *_place(lines)]
        return f"{self._named(ranks)} {how}" + (f" ({' / '.join(shown)})" if shown else "")

    def _named(self, ranks: list[int]) -> str:
        """Ranks, with their hosts if there are several."""
        names = [f"{rank} on {self._hosts[rank]}" if self._hosts else str(rank) for rank in ranks]
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(names)}"

    def _how_ended(self, ranks: list[int]) -> set[str]:
        """The connection of a process ends before the process; so wait a moment."""
        assert self._job is not None
        end = time.monotonic() + _END_SECONDS
        while set(ranks) - set(ended := self._job.ended()) and time.monotonic() < end:
            time.sleep(0.01)
        return {ended.get(rank, "its connection ended, its process did not") for rank in ranks}


def _place(lines: list[str]) -> list[str]:
    """Where a process was, from its output: its last dump of stacks, or its last lines."""
    dumps = [i for i, line in enumerate(lines) if line.startswith(("Thread ", "Current thread"))]
    # Of all threads, a signal that ends the process names the current one. In a dump that was
    # requested the main thread comes last. The innermost frame is first.
    current = [i for i in dumps if lines[i].startswith("Current thread")]
    start = (current or dumps)[-1:] or None
    if start is None:
        return lines[-2:]
    frames = list(itertools.takewhile(lambda line: line.startswith("File "), lines[start[0] + 1 :]))
    others = ("site-packages", "conformance/ranks", "<frozen")
    own = [frame for frame in frames[1:] if not any(place in frame for place in others)]
    return frames[:1] + own[:1]


def _same_versions(loaded: list[Message]) -> dict[str, str]:
    """The versions of the software of the ranks, and their hosts if there are several.

    Raises:
        StartError: they differ.
    """
    first = loaded[0].content
    for rank, answer in enumerate(loaded):
        own, others = answer.content["versions"], first["versions"]
        for name in {**others, **own}:
            if own.get(name) != others.get(name):
                raise StartError(
                    f"all ranks must have the same versions, but rank 0 on {first['host']} has "
                    f"{name} {others.get(name, 'unknown')}, and rank {rank} on "
                    f"{answer.content['host']} has {own.get(name, 'unknown')}"
                )
    hosts = dict.fromkeys(answer.content["host"] for answer in loaded)
    return {**first["versions"], **({"hosts": ", ".join(hosts)} if len(hosts) > 1 else {})}


def _share_of_memory(ranks: int) -> int:
    """Bytes of the machine's memory for each of its ranks, but enough for a framework."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(_MIN_MEMORY, whole // ranks)


def _stuck(activity: Activity, deadline: float, patience: float) -> str:
    """Why ranks that have not answered will not; empty if they may."""
    if (idle := activity.idle_seconds()) > _IDLE_SECONDS * patience:
        return f"did not answer, and no rank did anything for {idle:.1f} s"
    longest = max(_MIN_BUSY_SECONDS, _BUSY_SHARE * deadline) * patience
    if activity.busiest_seconds() > longest:
        return f"did not answer in {longest:.0f} s of processor time"
    return ""


def _patience(target: Target) -> float:
    backend = FRAMEWORKS[target.framework].backends.get(target.backend or "")
    compiles = target.mode == "graph" or (backend is not None and backend.compiles)
    return _PATIENCE if compiles or target.rung == "interpreted" else 1.0


def _changed(outcome: Outcome, which: str) -> list[str]:
    """What the layer changed on each rank on which `which` is so, in words."""
    return [
        f"rank {rank}: {', '.join(answer.content['changed'])}"
        for rank, answer in enumerate(outcome.answers)
        if answer is not None and answer.content.get(which)
    ]


def _errors(answer: Message | None) -> list[str]:
    if answer is None:
        return []
    places = [answer.content, *answer.content.get("steps", [])]
    described = [place["error"] for place in places if "error" in place]
    texts = [f"{error['types'][0]}: {error['message']}" for error in described]
    return texts + ([answer.content["failed"]] if "failed" in answer.content else [])


def went_wrong(answer: Message | None) -> bool:
    """Whether a rank answered with an error, of the target or of the suite."""
    return bool(_errors(answer))
