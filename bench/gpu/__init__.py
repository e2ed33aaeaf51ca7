"""The queue of everything that is measured on a GPU: `bash bench/gpu.sh`."""
