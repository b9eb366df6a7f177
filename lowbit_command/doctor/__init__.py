"""``lowbit doctor``: what is wrong with an installation, and the command that mends it.

A *probe* is a file of ``probes``: ``gather`` observes facts, in a child process, and ``judge`` turns facts into
findings. Facts are plain JSON values, and ``judge`` is a pure function of them, so that any machine can be described in
a test. ``child`` is the program that the children run, ``children`` starts them with a time limit: a driver that hangs
or a library that crashes is a finding like any other.

``coverage`` says how each op would run on each device, ``selftest`` runs every kernel against the reference; both use
the inputs of ``cases``. ``show`` prints.

Nothing here needs torch, Lightning or a working compiler to be imported: these are what is examined.
"""

from lowbit_command.doctor.finding import FAIL, OK, WARN, Finding

__all__ = ["FAIL", "OK", "WARN", "Finding"]
