"""Where optimizer state lives: its 8-bit form (``blocks``), its shards (``shards``), its pages in larger memory
(``pages``)."""
