"""From a plan to running kernels: source text, compilation, launch."""
