"""What a process draws that nobody has seeded, and what it counts threads by."""

import json
import multiprocessing
import os
import random
import tempfile
import uuid

import numpy
import torch

print(
    json.dumps(
        {
            "random": random.random(),
            "numpy": numpy.random.rand(),
            "key": multiprocessing.current_process().authkey.hex(),
            "name": os.path.basename(tempfile.mktemp()),
            "uuid": str(uuid.uuid4()),
            "torch": torch.rand(1).item(),
            "threads": torch.get_num_threads(),
            "token": os.environ.get("STORMJIB_TOKEN"),
            "session": os.getsid(0) == os.getpid(),
        }
    )
)
