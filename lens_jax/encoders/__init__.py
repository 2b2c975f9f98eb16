"""What stands in front of the denoiser: image codecs and text encoders, each behind one protocol."""
