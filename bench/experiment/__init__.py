"""The CIFAR-10 experiment: SAFER beside its rivals, `python -m bench.experiment`."""
