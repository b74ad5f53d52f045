"""Load generators and benchmarks; they speak HTTP to the service and import nothing of it."""

import os

# As the service does for itself (before torch is imported): on cores that several processes share, OpenMP threads
# that spin while they wait make every measurement one of the spinning.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
