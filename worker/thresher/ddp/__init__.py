"""The compressors without a parameter server: a communication hook for torch's DistributedDataParallel."""

from thresher.ddp.hook import CompressionState, CompressionStatistics, compress

__all__ = ["CompressionState", "CompressionStatistics", "compress"]
