"""The pre-training job: its config, the networks in front of the denoiser, and what they are stored as."""
