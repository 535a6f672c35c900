"""Print the device and the versions that the steps of gpu.sh run on."""

import platform

import torch
import triton

if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    memory, cache = properties.total_memory / 2**30, properties.L2_cache_size / 2**20
    print(f"device {properties.name}, {memory:.0f} GiB, L2 {cache:.0f} MiB, cuda {torch.version.cuda}")
else:
    print(f"device {platform.machine()}, no GPU")
print(f"python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}")
