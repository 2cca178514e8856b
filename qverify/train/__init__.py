"""The trainer: QA-IBP and what certified training has learned since, exported to quantized ONNX."""
