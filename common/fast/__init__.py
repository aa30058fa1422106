"""The same numbers, sooner: fused layers, kernels, CUDA graphs. Skip it at first reading."""
