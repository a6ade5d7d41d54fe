"""Quantized ONNX: one export of the model with opaque linears, lowered for each target."""
