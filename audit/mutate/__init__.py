"""Faults that were not planned: random changes to the source of syncbn.torch, judged by the suite.

changes.py   the kinds of change
draw.py      draws mutants: copies of a file with one change in one function
run.py       runs the suite on each mutant until a case detects it
result.py    how a mutant was detected, or that it survived
show.py      the results on the terminal and as JSON

The kind `swap` exchanges two statements of one block: faults like those of another programmer. The
other kinds are the usual operators of mutation testing (DeMillo, Lipton and Sayward, Computer 11,
1978). A mutant that survives is equivalent to the layer, or shows a gap of the suite.
"""
