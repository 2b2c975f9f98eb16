"""The prompt reasoner: a language model rewrites a prompt before it is drawn (report 5; release: reasoner.py)."""
