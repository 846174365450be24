"""Certificates: a package that shows what a layer did in all runs of the suite, and its verifier.

`syncbn-conformance certify` makes a package, `syncbn-conformance verify` checks one. See
docs/certify.md.
"""
