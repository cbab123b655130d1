"""One shard: the part of the model that one server process owns."""

import thresher.protos.transport  # noqa: F401 - before gRPC is imported: see there
