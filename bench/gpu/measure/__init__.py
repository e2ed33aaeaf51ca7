"""The programs of the queue's parts, each run as `python -m gpu.measure.NAME`."""
