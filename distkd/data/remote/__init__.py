"""Shard sets that lie elsewhere: fetched once a node, read one shard after another."""
