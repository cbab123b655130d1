"""The contract: what worker and server agree on, and nothing else."""
