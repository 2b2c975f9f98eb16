"""The denoiser in PyTorch, to check numbers and speeds against. Needs torch, which nothing else in lens_jax does."""
