"""Low-bit weights in other libraries: ``integrations.transformers``, ``integrations.peft``.

Each is imported only when it is asked for, registers itself with its library by that, and needs the extra
``lowbit-lightning[transformers]``.
"""
