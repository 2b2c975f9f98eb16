"""Captions by a vision model: what is asked, what counts as an answer, what it costs, and how nothing is paid twice."""
