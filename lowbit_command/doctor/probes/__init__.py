"""The probes. Each file has

- ``LIMIT``: seconds after which it is taken to hang;
- ``BARE = True`` where it does without torch;
- ``gather()``: the facts, plain JSON values, observed in a child process;
- ``judge(facts)``: the findings; a pure function.
"""
