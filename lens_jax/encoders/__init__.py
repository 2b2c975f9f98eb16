"""Prompts to features: text encoders behind one protocol."""
