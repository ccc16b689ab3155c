"""Studies that were made once, and can be repeated: FP8, memory traffic, attention kernels."""
