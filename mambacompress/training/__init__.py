"""Training: a small language-model trainer and the passes that need gradients."""
