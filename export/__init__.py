"""Merge the adapters, write ONNX graphs and 4-bit weights, compare them with torch, and pack a bundle."""
