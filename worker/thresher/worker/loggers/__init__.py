"""Where the rows of a worker can go: ``session.on_step(TensorBoard(writer))``. docs/loggers.md has an own one first."""
