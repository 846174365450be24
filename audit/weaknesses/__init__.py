"""What the judge once did wrong as a vendor, the owner of a CI or an attacker met it, tried again.

`rows.toml` has the three tables, each row with the tests and cases that try it now. `run` runs
them.
"""
