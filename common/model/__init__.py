"""SDXL and its adapter on the device: loading, weights, what the model predicts, noise, out of memory."""
