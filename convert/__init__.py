"""Checkpoints of the PyTorch release, read and written: safetensors files and one table of names a component."""
