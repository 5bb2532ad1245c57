"""Where each engine's shards of each matrix are: one file per engine, one question each (see ``detect.read``)."""
