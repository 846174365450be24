"""The storm: runs of the suite under random faults, none of which may lose a case or leave a trace.

`run` starts runs, sends faults from outside, and checks what each run leaves. `one_machine` and
`two_hosts` have these faults. `layer` is the layer that they judge, which misbehaves from inside.
"""

SLEEP = "1000.125"  # seconds that children of the layer sleep; by this argument they are found
