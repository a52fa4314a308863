"""fxpar: a PyTorch model written for one GPU, run on many, without an edit."""
