"""Training: torch lives here (and in export), nowhere else."""

import os

# torch's OpenMP threads spin while they wait for each other. As soon as anything else runs on the same cores (the
# process that decodes images is enough) a spinning thread keeps the working one from its core: measured 4x slower
# training on two cores with one other busy process. Read once, when torch is loaded, hence here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
