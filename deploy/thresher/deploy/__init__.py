"""Together: how many servers and workers, and where; the command line."""
