"""The conformance suite: is a SyncBatchNorm right, on any number of ranks?

`python -m conformance run --target syncbn.torch --ranks 4`
"""
