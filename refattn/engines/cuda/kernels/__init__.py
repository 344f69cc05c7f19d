"""CUDA kernels: factories that close over the primitives, of a device or of the simulator, and a form's constants."""
