"""Models as ONNX graphs for ONNX Runtime: exported, quantized, and described from their files."""
