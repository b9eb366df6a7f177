"""The CUDA backend: CUDA C++ from ``src/``, compiled by NVRTC for the device at hand, on torch's current stream.

Each file has the functions of one class in ``backend.py``; their results are bit-identical to the reference. A function
takes the device's tensors, allocates its results with torch and describes launches (``launch.py``). None waits for the
device, so all of them can be captured in a CUDA graph. Sources are specialised by macros for each combination of types
and block size that occurs.
"""

from lowbit_lightning.kernels.cuda.launch import load
