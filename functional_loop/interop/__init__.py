"""Ways in and out: `modules` for `torch.nn` and `torch.optim` objects, `files` for checkpoints and safetensors."""
