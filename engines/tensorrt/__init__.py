"""TensorRT and TensorRT-RTX: one builder, one plan cache, one engine for both."""
