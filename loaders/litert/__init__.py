"""LiteRT (TensorFlow Lite): models converted to .tflite files, in an environment of their own, and read here."""
