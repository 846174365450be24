"""Conformance reports: one JSON document per run, and its table for the terminal.

    report = reports.load("runs/1/report.json")
    reports.summarize(report, rich.console.Console())

A report is a plain dict of JSON values, described field by field in `schema/report-1.json`. The
conformance runner builds it and saves it when a run ends; here it is checked, kept and shown, and
never judged again. Nothing else of the repository is imported, so that a report can be read
without a framework.

`syncbn-conformance report show FILE` prints the table of a report, `findings FILE...` writes a
document.
"""

from syncbn.extras import require

require("syncbn.reports", "conformance", "rich", "jsonschema")

from syncbn.reports.document import SCHEMA, Report, ReportError, load, save, validate
from syncbn.reports.findings import findings
from syncbn.reports.table import summarize

__all__ = ["SCHEMA", "Report", "ReportError", "findings", "load", "save", "summarize", "validate"]
