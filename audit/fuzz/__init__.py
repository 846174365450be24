"""The fuzzer: readers of bytes from outside get random bytes, and may answer only with a refusal.

`run` starts one process for each reader, and reports what it found. `reader` is that process, in
which Atheris chooses the bytes by the lines of the suite that they reach.
"""

READERS = ("report", "case", "wire")
