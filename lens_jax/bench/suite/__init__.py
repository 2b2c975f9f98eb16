"""`lens-jax bench suite`: every measurement in one command that always leaves an answer.

`command` orders the parts and shares out the time; `process` runs a part in a process of its own and ends it; `child`
is that process; `results` keeps what is known and `header` what it was measured with. These do not import JAX: the
process that watches over the others must not hold the device. The other files say what is measured.
"""
