"""NVIDIA DALI: a loader that decodes and crops on the GPU."""
