"""A report as a table for the terminal."""

from __future__ import annotations

import json
import shlex
from collections import Counter, defaultdict
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from syncbn.reports.document import Report
from syncbn.reports.text import one_line, shown

_STYLES = {
    "pass": "green",
    "fail": "bold red",
    "hang": "bold red",
    "crash": "bold red",
    "error": "bold magenta",
    "unsupported": "yellow",
    "not-run": "yellow",
}
_SUMMARIES = {
    "pass": ("pass", "bold green"),
    "fail": ("FAIL", "bold red"),
    "error": ("NO VERDICT, the suite or the machine failed", "bold magenta"),
    "incomplete": ("INCOMPLETE, the run was stopped", "bold magenta"),
}
_OF_ORACLE = ("oracle departs", "no answer")
_FAILING = ("fail", "hang", "crash", "error")
_CASES_SHOWN = 3
_LINES_SHOWN = 6  # of a message, which may contain the stacks of all ranks


def summarize(report: Report, console: Console) -> None:
    """Print a report: what was judged, a row per clause, the failing cases, one last line.

    The table fits 80 columns; with 100 columns, no title of the contract is broken. Only replay
    commands and the last line may be longer than the console is wide, so that they can be copied
    and searched. Only a terminal gets colours. The ratio of a clause is the largest of its cases.
    A clause marked * does not count for the verdict.

    Args:
        report: a valid report, as `load` returns it.
        console: where to print.
    """
    report = shown(report)
    failing: dict[str, list[Any]] = {clause["id"]: [] for clause in report["clauses"]}
    for case in report["cases"]:
        if case["verdict"] in _FAILING:
            failing[case["clause"]].append(case)
    console.print(_header(report))
    console.print()
    console.print(_table(report, failing, console.width))
    if not all(clause["required"] for clause in report["clauses"]):
        console.print(Text("* does not count for the verdict", "dim"))
    for clause in report["clauses"]:
        if failing[clause["id"]]:
            console.print()
            _print_failing(report, clause, failing[clause["id"]], console)
    console.print()
    console.print(_must_pass(report), soft_wrap=True)
    if report["restarts"]:
        console.print(_restarts(report), soft_wrap=True)
    if changed := [case for case in report["cases"] if case.get("changed")]:
        console.print(_changed(changed), soft_wrap=True)
    _print_oracle(report, console)
    console.print(_last_line(report), soft_wrap=True)


def _header(report: Report) -> Table:
    header = Table.grid(padding=(0, 2))
    for name, value in facts(report).items():
        header.add_row(Text(name, "dim"), Text(value, overflow="fold"))
    return header


def _table(report: Report, failing: dict[str, list[Any]], width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("clause", no_wrap=True)
    table.add_column("title", overflow="fold")
    # The longest origin, "doc, decided", gives way to the titles.
    table.add_column("origin", max_width=None if width >= 100 else len("decided"))
    table.add_column("verdict", no_wrap=True)
    table.add_column("cases", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    for clause in report["clauses"]:
        title = Text(clause["title"])
        # The reason of a failing clause is below, as the message of its first failing case.
        if clause["reason"] and not failing[clause["id"]]:
            some = f"{clause['unsupported']} unsupported: " if clause["verdict"] == "pass" else ""
            title.append(f"\n{some}{clause['reason']}", "dim")
        table.add_row(
            Text(_mark(clause)),
            title,
            clause["origin"],
            _verdict(clause["verdict"]),
            str(clause["cases"]),
            ratio_text(clause["worst_ratio"]),
        )
    return table


def _print_failing(report: Report, clause: Any, cases: list[Any], console: Console) -> None:
    counts = f" ({len(cases)} of {clause['cases']} cases)"
    console.print(Text.assemble((f"{_mark(clause)} {clause['title']}", "bold"), counts))
    for case in cases[:_CASES_SHOWN]:
        console.print(Padding.indent(_case(case), 2))
        if case["message"]:
            console.print(Padding.indent(_message(case["message"]), 4))
        # Not wrapped, so that it can be copied whole.
        console.print(Text(f"    {replay_command(report, case)}", "cyan"), soft_wrap=True)
    if len(cases) > _CASES_SHOWN:
        console.print(Text(f"  and {len(cases) - _CASES_SHOWN} more", "dim"))


def _must_pass(report: Report) -> Text:
    """Whether all cases on the list of the profile ran."""
    listed, missing = report["must_pass"]["listed"], report["must_pass"]["missing"]
    if not listed:
        return Text(f"there is no list of cases for {report['ranks']} ranks", "dim")
    if not missing:
        return Text(f"all {listed} cases on the list of {report['profile']} ran", "dim")
    some = ", ".join(missing[:_CASES_SHOWN])
    text = (
        f"{len(missing)} of {listed} cases on the list of {report['profile']} did not run: {some}"
    )
    return Text(text + (" ..." if len(missing) > _CASES_SHOWN else ""), "bold red")


def _restarts(report: Report) -> Text:
    """How often ranks were replaced. What cost a case its verdict is among the failing cases."""
    restarts = report["restarts"]
    verdicts = {case["id"]: case["verdict"] for case in report["cases"]}
    others = [one for one in restarts if verdicts.get(one["case"]) not in ("hang", "crash")]
    text = Text(f"the ranks were replaced {len(restarts)} times", "dim")
    if others:
        seconds = sum(one["seconds"] for one in others)
        text.append(f", {len(others)} times between cases ({seconds:.0f} s): ", "yellow")
        text.append(others[0]["reason"].splitlines()[0], "yellow")
    return text


def _changed(cases: list[Any]) -> Text:
    """What the layer changed in the processes of the ranks, although no case needs that."""
    text = Text(f"the layer changed its process in {len(cases)} cases: ", "yellow")
    return text.append(f"{cases[0]['id']} {cases[0]['changed'][0]}")


def _print_oracle(report: Report, console: Console) -> None:
    """How often target, oracle and reference depart from each other, and where."""
    oracle = report["oracle"]["target"]
    if oracle is None:
        console.print(Text(f"oracle left out: {report['oracle']['left_out']}", "dim"))
        return
    messages: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    findings: Counter[str] = Counter()
    for case in report["cases"]:
        if case["oracle"]:
            finding = case["oracle"]["finding"]
            findings[finding] += 1
            message = case["oracle"]["message"] or "the oracle passes"
            messages[case["clause"], finding].append(message)
    counts = ", ".join(f"{finding} {count}" for finding, count in findings.most_common())
    what = f"{oracle['name']} ({oracle['device']}, rung {oracle['rung']})"
    console.print(f"three ways, with {what} as the oracle: {counts}", highlight=False)
    for clause in report["clauses"]:
        for finding in ("target departs", "reference departs", "both depart", *_OF_ORACLE):
            if found := messages[clause["id"], finding]:
                line = Text(f"  {clause['id']:<8} {finding} in {len(found)} of")
                line.append(f" {clause['cases']}: {one_line(found[0].splitlines()[0])}")
                console.print(line, overflow="ellipsis", no_wrap=True)
    console.print()


def _case(case: Any) -> Text:
    text = Text.assemble(f"{case['id']} ", _verdict(case["verdict"]))
    if case["ratio"] is not None:
        text.append(f", ratio {ratio_text(case['ratio'])}")
    if title := case["spec"].get("title"):
        text.append(f": {title}")
    return text


def _message(message: str) -> Text:
    lines = message.splitlines()
    text = Text("\n".join(lines[:_LINES_SHOWN]), overflow="fold")
    if len(lines) > _LINES_SHOWN:
        text.append(f"\nand {len(lines) - _LINES_SHOWN} more lines in the report", "dim")
    return text


def _last_line(report: Report) -> Text:
    summary, clauses = report["summary"], report["clauses"]
    verdict = _SUMMARIES[summary["verdict"]]
    line = Text.assemble(
        verdict,
        f": {summary['required']['pass']} of {sum(summary['required'].values())} required clauses",
        "" if summary["verdict"] == "pass" else " pass",
        f", {sum(summary['cases'].values())} cases in {_duration(report['seconds'])}",
    )
    for name in _STYLES:
        ids = [_mark(clause) for clause in clauses if clause["verdict"] == name]
        if ids and name != "pass" and not (name == "not-run" and report.get("selection")):
            line.append(f"; {name.replace('-', ' ')}: {', '.join(ids)}")
    return line


def facts(report: Report) -> dict[str, str]:
    """What was judged, how and by what, by name."""
    target, suite = report["target"], report["suite"]
    commit = f"commit {suite['commit'][:12]}" if suite["commit"] else "commit unknown"
    mode = f", mode {target['mode']}" if target["mode"] else ""
    dirty = ", with local changes" if suite["dirty"] else ""
    found = {
        "target": f"{target['name']} ({target['framework']}: {target['module']}.{target['class']})",
        "ranks": f"{report['ranks']}, launcher {report['launcher']}",
        "backend": target["backend"] or "the target's own",
        "device": f"{target['device']}, rung {target['rung']}{mode}",
        "profile": f"{report['profile']}, level {report['level']}",
        "suite": f"{suite['version']}, {commit}{dirty}",
    }
    if run := report.get("run"):
        found["run"] = f"{run['id']}, {run['started']}"
    if selection := report.get("selection"):
        parts = [*selection["clauses"], *selection["cases"]]
        parts += [f"shard {selection['shard']}"] * bool(selection["shard"])
        found["selection"] = f"a part of the profile only: {', '.join(parts)}"
    return found


def subject(report: Report) -> str:
    """What a report is of, in a few words."""
    target, ranks = report["target"], report["ranks"]
    backend = f" --backend {target['backend']}" if target["backend"] else ""
    mode = f" --mode {target['mode']}" if target["mode"] else ""
    of = f"{target['name']}{backend}{mode} on {ranks} {target['device']} rank{'s' * (ranks > 1)}"
    return one_line(f"{of}, profile {report['profile']}")


def replay_command(report: Report, case: Any) -> str:
    """The command that runs a case of a report again."""
    target = report["target"]
    command = ["syncbn-conformance", "replay", case["id"], "--target", target["name"]]
    for option, default in (("device", "cpu"), ("backend", "auto"), ("mode", "pynative")):
        if target[option] not in (None, default):
            command += [f"--{option}", target[option]]
    if target.get("collectives"):
        command += ["--collectives", target["collectives"]]
    if target.get("share_device"):
        command.append("--share-device")
    if target.get("layer_args"):
        command += ["--layer-args", json.dumps(target["layer_args"])]
    for option, name in (("setup", "setup"), ("framework", "framework_file")):
        if target.get(name):
            command += [f"--{option}", target[name]]
    if report["launcher"] != "local":
        command += ["--launcher", report["launcher"]]
    return shlex.join([*command, "--ranks", str(report["ranks"])])


def _mark(clause: Any) -> str:
    return clause["id"] if clause["required"] else f"{clause['id']}*"


def _verdict(name: str) -> Text:
    return Text(name.replace("-", " "), _STYLES[name])


def ratio_text(ratio: float | str | None) -> str:
    """A ratio with three digits; "" if there is none."""
    return "" if ratio is None else f"{float(ratio):#.3g}".rstrip(".")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes >= 2 else f"{seconds:.3g} s"
