"""The conformance suite: is a SyncBatchNorm right, on any number of ranks?

`syncbn-conformance run --target syncbn.torch --ranks 4`
"""


class ConformanceError(Exception):
    """A request that cannot be carried out. A command prints the text and exits with status 2."""
