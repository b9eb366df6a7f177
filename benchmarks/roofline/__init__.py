"""What decides a CUDA kernel's speed, computed without a GPU: issue slots (``sass``), traffic (``memory``), a device's
limits (``devices``), for the kernels in ``work``. ``benchmarks/cuda_roofline.py`` prints it."""
