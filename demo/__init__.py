"""What `--demo` runs on: a tiny SDXL and a small drawn image set, made on the spot."""
