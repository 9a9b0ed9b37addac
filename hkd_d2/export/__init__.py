"""A trained detector out of PyTorch: ONNX, torch.export, TorchScript, safetensors, model card."""
