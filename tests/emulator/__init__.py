"""Runs CUDA C++ kernels, unmodified, on the CPU, and finds their mistakes. No GPU, driver or CUDA header is needed.

A kernel's text is compiled by the host compiler behind ``cuda_language.h``, which gives CUDA's words a meaning there.
Every CUDA thread is a fiber; ``scheduler.cpp`` switches fibers where CUDA threads wait for each other (barriers, warp
collectives) and nowhere else, in one of three orders: forward, backward, random. Shared memory is filled with 0xFF
(NaN, -1) before every block. A kernel that forgets a barrier therefore gives a wrong result in one order at least.

A misaligned access is an error, always. With ``check=True`` the compiler also reports every memory access (its own
instrumentation for thread sanitizers), and ``checker.cpp`` raises on the first that is out of bounds, reads shared
memory never written, or races with an access of another thread that no barrier separates from it.

An asynchronous copy overwrites its target with 0xFF when it starts, and takes place when its thread waits for it: who
reads too early, or still reads what is replaced, gets a wrong result, and check mode names the place.

What it cannot see: anything between launches (streams, events, lifetimes), inline PTX (a kernel has to offer plain C++
where ``__CUDA_ARCH__`` is not defined), and speed.
"""

from emulator.module import EmulatorError, Module

__all__ = ["EmulatorError", "Module"]
