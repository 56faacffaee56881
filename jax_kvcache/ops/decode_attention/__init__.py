"""The operator that reads the cache: attention of new queries over it."""
