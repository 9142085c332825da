"""A shard set for people: pages of numbers, and pictures."""
