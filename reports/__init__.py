"""Conformance reports: one JSON document per run, and its table for the terminal.

    report = reports.load("runs/1/report.json")
    reports.summarize(report, rich.console.Console())

A report is a plain dict of JSON values; `schema/report-1.json` describes each field. The suite
builds and saves it when a run ends (syncbn.conformance.report). This package checks, saves, loads
and shows it, and never judges again. It imports no other part of syncbn that needs a
framework, so that a report can be read everywhere.

`syncbn-conformance report show FILE` prints the table of a report; `report findings FILE...` writes
a Markdown page.
"""

from syncbn.extras import require

require("syncbn.reports", "conformance", "rich", "jsonschema")

from syncbn.reports.document import SCHEMA, Report, load, save, validate
from syncbn.reports.files import ReportError, write
from syncbn.reports.findings import findings
from syncbn.reports.junit import junit
from syncbn.reports.table import summarize

__all__ = [
    "SCHEMA",
    "Report",
    "ReportError",
    "findings",
    "junit",
    "load",
    "save",
    "summarize",
    "validate",
    "write",
]
