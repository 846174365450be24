"""Known failures of SyncBatchNorm in other projects, and the cases that would have caught them.

known.toml   the failures
known.py     reads them and checks that the cases fit
page.py      writes docs/failure-modes.md
"""
