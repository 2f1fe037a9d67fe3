"""ONNX Runtime sessions over a verified bundle."""
