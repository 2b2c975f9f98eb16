"""Runs, one python file each. The docstring says the command, the hardware, and what to expect."""
