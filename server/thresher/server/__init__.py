"""One shard: the part of the model that one server process owns."""
