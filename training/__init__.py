"""Training: torch lives here (and in export), nowhere else.

Importing this package sets two things of the process, before torch is loaded, that training on CPUs lives on.
"""

import ctypes
import os
import sys

# torch's OpenMP threads spin while they wait for each other. As soon as anything else runs on the same cores (the
# process that decodes images is enough) a spinning thread keeps the working one from its core: measured 4x slower
# training on two cores with one other busy process. Read once, when torch is loaded, hence here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _keep_freed_memory() -> None:
    """Let glibc's allocator keep freed blocks of any size instead of handing them back to the kernel.

    Activations of tens of MiB are freed and asked for again at every step; each time the kernel maps and zeroes their
    pages anew: 300,000 page faults a step and a fifth to a half of the CPU time (MobileNetV2, 16 crops of 320).
    """
    if sys.platform != "linux":
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library (musl): nothing to set
        return
    mallopt(m_mmap_threshold, 1 << 30)
    mallopt(m_trim_threshold, (1 << 31) - 1)


_keep_freed_memory()
