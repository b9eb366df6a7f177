"""Where optimizer state lives: its 8-bit form (``blocks``) and its shards (``shards``)."""
