"""Microbenchmarks of ``maxmin_kernels``: workloads, baselines, an equivalence gate, timing, bars, report.

Data flows one way: floors, baselines -> workloads -> gate, measure (on a device) -> bars, report, plot.
"""

import os

# The profiler, which counts the CPU's bytes, otherwise prints a line when it starts and when it stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
