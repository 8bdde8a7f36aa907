"""LiteRT (TensorFlow Lite): models as .tflite files, converted in an environment of their own."""
