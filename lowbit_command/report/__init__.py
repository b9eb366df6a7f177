"""The report of a training run: what is kept of it, and how it is shown.

``Record`` (``record``) is a run as plain values: curves (``series``), memory, layers, configuration. It is written as
``report.json``. ``page`` shows one record as a file of HTML, ``compare`` several. ``chart`` draws curves as SVG,
``parts`` everything else, ``style`` has the colours. ``differences`` compares configurations.

Nothing here needs torch or Lightning: ``lowbit_lightning.callbacks.RunReport`` fills the record during training, and
``command``, the command ``lowbit report``, reads it anywhere.
"""

from lowbit_command.report.record import Record
from lowbit_command.report.series import Series

__all__ = ["Record", "Series"]
