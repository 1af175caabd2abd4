"""torchvision's side of test_faithful.py: runs under a Python that has it and no TensorFlow.

    python tests/torch_crops.py < cases.json > boxes.json

A case is [height, width, [low, high] of the area, count]; a result has count lists of y, x, height,
width.
"""
import json
import sys
import types

import torch

# PyPI's torchvision is of a PyTorch with CUDA: beside one without it, this part fails, unneeded
sys.modules['torchvision._meta_registrations'] = types.ModuleType('unneeded')
from torchvision.transforms import RandomResizedCrop  # noqa: E402

torch.manual_seed(0)
json.dump([[RandomResizedCrop.get_params(torch.empty(3, height, width), area, (3 / 4, 4 / 3))
            for _ in range(count)] for height, width, area, count in json.load(sys.stdin)],
          sys.stdout)
