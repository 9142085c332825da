"""Raw data to shards, shards to batches: manifest, plan, reader, transform and loader. No process group in here."""
