"""Makes the CUDA-linked torchvision wheel importable beside a CPU-only torch.

torchvision/_C.so cannot be loaded there (no libcudart), and torchvision then still registers a fake for
`torchvision::nms` at import, which needs the operator's schema. This declares it, without a kernel, just before
torchvision is imported. Installed as a .pth file, so that SGLang's child processes have it too.
"""

import importlib.abc
import sys


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            _declare()


def _declare():
    import torch

    global _library  # the schemas live as long as this object
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        try:
            _library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            continue  # declared already


sys.meta_path.insert(0, _BeforeTorchvision())
