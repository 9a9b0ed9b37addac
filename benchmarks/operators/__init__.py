"""The operator benchmark behind tools/benchmark_ops.py. Needs PyTorch; torchvision and matplotlib
are used where they are installed."""
