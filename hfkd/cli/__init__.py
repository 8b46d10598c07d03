"""The command line of hfkd."""

import os

# Set before torch is loaded. By default a CPU thread that waits for the others spins, and on a machine that is busy
# with something else it then takes the very time that the others need: whole runs become several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
