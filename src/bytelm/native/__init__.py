"""C++ kernels for decoding, compiled on first use if there is a compiler."""
