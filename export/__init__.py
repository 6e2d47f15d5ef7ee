"""Export: torch to ONNX and onwards; parity is the gate."""
