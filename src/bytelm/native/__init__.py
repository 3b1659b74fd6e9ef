"""Kernels in C++ for reading byte by byte, compiled on first use where there is a compiler."""
