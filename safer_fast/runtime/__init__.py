"""The machine and the process: device, ranks, signals, CUDA graphs, time, files on disk."""
