"""Where optimizer state lives: ``store`` gives it in the ``form`` that is asked for, as codes and scales (``blocks``),
in larger memory (``pagers``, ``pages``), in parts (``shards``), and takes in what was ``saved``."""
