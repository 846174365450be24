"""What follows from the results of a certificate: its log, its text, its statement.

The maker writes these files, and the verifier makes them again and compares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from syncbn.conformance.certification.plan import Plan, shortfalls
from syncbn.reports.document import Report
from syncbn.reports.text import code, markdown

CERTIFICATE, TEXT, PRODUCT = "certificate.json", "CERTIFICATE.md", "product.json"
ENVIRONMENT, LOG = "environment.json", "log.jsonl"
REPORT, JUNIT, RAW = "report.json", "junit.xml", "raw.bin"

_RUNGS = {
    "device": "executed on {device}",
    "substituted": "substituted: executed on {device}, with substitutes for the vendor's kernels",
    "interpreted": "interpreted: the kernels ran in an interpreter on {device}",
    "twin": "twin: the kernels, as the vendor's compiler lowered them, were compiled for {device}",
    "lowered": "lowered: the kernels were compiled and did not run",
}

_LIMITS = """\
- The layer runs in the process of the rank that answers the suite. The suite notices accidents. It
  does not notice a layer, or a vendor, that is made to deceive it: raw results can be invented.
- The digests bind the files to each other. Only a signature binds them to somebody.
- It shows what its machines did on one day. Product, environment and times are as the maker's
  machine gave them; the verifier can only compare the places at which they stand.
- The digests of the layer are those of the files that the ranks had loaded. Compare them with the
  files of the product.
- Large arrays were judged whole when the run was made. The verifier judges a sample of each, and
  the values that the run found to be the worst.
- It is about one device, one mode and one backend, and about no other.
"""


def name_of(ranks: int, file: str) -> str:
    """The name of a file of a run in a package."""
    return f"runs/{ranks}/{file}"


def names(runs: tuple[int, ...]) -> list[str]:
    """The names of all files of a package, except those of its certificate and its signature."""
    of_runs = [name_of(ranks, file) for ranks in runs for file in (REPORT, JUNIT, RAW)]
    return [TEXT, PRODUCT, ENVIRONMENT, LOG, *of_runs]


def begin_line(product: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """The first line of the log, from before the first run. The files of the layer come later."""
    known = {name: value for name, value in environment.items() if name != "sources"}
    return {"event": "begin", "product": product, "environment": known}


def run_line(report: Report) -> dict[str, Any]:
    """The line of a run that begins. Of the report it needs what is settled then."""
    settled = ("ranks", "run", "suite", "target", "oracle", "launcher", "profile", "level")
    return {"event": "run"} | {name: report[name] for name in settled}


def case_line(ranks: int, row: Mapping[str, Any], raw: str | None) -> dict[str, Any]:
    """The line of a case. raw: the SHA-256 of its raw results; None if it did not run."""
    kept = ("id", "verdict", "ratio", "message", "seconds")
    return {"event": "case", "ranks": ranks, "raw": raw} | {name: row[name] for name in kept}


def ran_line(report: Report, sources: dict[str, Any]) -> dict[str, Any]:
    """The line of a run that has ended, with the files of the layer that its ranks had loaded."""
    kept = {name: report[name] for name in ("ranks", "seconds", "environment", "restarts")}
    return {"event": "ran"} | kept | {"verdict": report["summary"]["verdict"], "sources": sources}


def end_line(result: str) -> dict[str, Any]:
    return {"event": "end", "result": result}


def result_of(reports: Mapping[int, Report], plan: Plan, level: str) -> str:
    """PASSED or FAILED, as the test-result predicate of in-toto names them."""
    failed = any(shortfalls(report, plan, level) for report in reports.values())
    return "FAILED" if failed else "PASSED"


def statement(
    digests: Mapping[str, str], reports: Mapping[int, Report], result: str
) -> dict[str, Any]:
    """The certificate: an in-toto Statement v1 with the predicate test-result v0.1.

    Args:
        digests: the SHA-256 of every other file.
        reports: by number of ranks.
        result: see `result_of`.
    """
    resources = [{"name": name, "digest": {"sha256": digests[name]}} for name in sorted(digests)]
    tests: dict[str, list[str]] = {"pass": [], "warned": [], "failed": []}
    for ranks, report in reports.items():
        for clause in report["clauses"]:
            outcome = clause["verdict"] if clause["verdict"] in ("pass", "not-run") else "failed"
            if outcome == "failed" and not clause["required"]:
                outcome = "warned"
            if outcome in tests:
                tests[outcome].append(f"{clause['id']} on {ranks} ranks")
    configuration = [one for one in resources if one["name"] in (ENVIRONMENT, PRODUCT)]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": resources,
        "predicateType": "https://in-toto.io/attestation/test-result/v0.1",
        "predicate": {
            "result": result,
            "configuration": configuration,
            "passedTests": tests["pass"],
            "warnedTests": tests["warned"],
            "failedTests": tests["failed"],
        },
    }


def text(
    product: Mapping[str, Any],
    environment: Mapping[str, Any],
    reports: Mapping[int, Report],
    result: str,
    plan: Plan,
) -> str:
    """The certificate for readers, in Markdown."""
    return "\n".join(_text(product, environment, reports, result, plan)) + "\n"


def title(environment: Mapping[str, Any], result: str) -> str:
    """What was certified, in one line: result, level, layer, device, rung and ranks."""
    target = environment["target"]
    how = [f"mode {target['mode']}"] if target["mode"] else []
    how += [f"backend {target['backend']}"] if target["backend"] else []
    how += [f"collectives {target['collectives']}"] if target["collectives"] else []
    how += ["ranks share a device"] if target["share_device"] else []
    rung = _RUNGS[target["rung"]].format(device=target["device"])
    ranks = ", ".join(map(str, environment["plan"]["ranks"]))
    layer = ", ".join([f"{target['name']} on {target['device']}", *how])
    return f"{result} at level {environment['level']}: {layer}; {rung}; {ranks} ranks"


def _text(
    product: Mapping[str, Any],
    environment: Mapping[str, Any],
    reports: Mapping[int, Report],
    result: str,
    plan: Plan,
) -> Iterator[str]:
    named = f"{product['name']} {product['version']} of {product['vendor']}"
    yield f"# Certificate: {markdown(named)}"
    yield f"\n**{markdown(title(environment, result))}**\n"
    yield "| | |\n|---|---|"
    here = environment["here"]
    suite = here["suite"]
    rows = {**product} | {
        "made": f"{environment['started']} on {here['host']}, {here['machine']['cpu']}",
        "suite": f"version {suite['version']}, commit {suite['commit']}",
        "SHA-256 of the suite": _digest_of(suite["files"]),
        "SHA-256 of the layer": _digest_of(environment["sources"]["files"]),
        "plan": f"{plan.name}, profile {plan.profile}",
    }
    for name, value in rows.items():
        yield f"| {name} | {markdown(value)} |"
    yield "\n| ranks | verdict | required clauses passed | cases | unsupported | largest ratio |"
    yield "|--:|---|--:|--:|--:|--:|"
    for ranks, report in reports.items():
        yield f"| {ranks} | {' | '.join(_row(report))} |"
    for ranks, report in reports.items():
        for reason in shortfalls(report, plan, environment["level"]):
            yield f"\nOn {ranks} ranks: {markdown(reason)}."
        failed = [one for one in report["clauses"] if one["required"] and one["verdict"] != "pass"]
        for clause in failed:
            reason = markdown(str(clause["reason"])[:300])
            yield f"\n- {clause['id']} ({markdown(clause['title'])}) {clause['verdict']}: {reason}"
        if others := ", ".join(_not_counted(report)):
            yield f"\nOn {ranks} ranks, clauses that do not count: {markdown(others)}."
    yield "\n## What this does not show\n"
    yield _LIMITS
    yield f"`syncbn-conformance verify` checks this package; made by {_command(environment)}"


def _row(report: Report) -> Iterator[str]:
    required, cases = report["summary"]["required"], report["summary"]["cases"]
    yield report["summary"]["verdict"]
    yield f"{required['pass']} of {sum(required.values())}"
    yield str(sum(cases.values()))
    yield str(cases["unsupported"])
    ratios = [one["worst_ratio"] for one in report["clauses"] if one["required"]]
    yield f"{max((float(one) for one in ratios if one is not None), default=0.0):.3g}"


def _not_counted(report: Report) -> Iterator[str]:
    """The clauses that do not count and did not pass, each with its verdict."""
    for clause in report["clauses"]:
        if clause["cases"] and not clause["required"] and clause["verdict"] != "pass":
            yield f"{clause['id']} {clause['verdict']}"


def _digest_of(files: Mapping[str, str]) -> str:
    """The SHA-256 of what `sha256sum` prints for the files in the order of their names."""
    lines = "".join(f"{files[name]}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def _command(environment: Mapping[str, Any]) -> str:
    return code(" ".join(environment["command"]))
