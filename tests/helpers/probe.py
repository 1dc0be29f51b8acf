"Models to look into, and what must be as it was afterwards."
import threading

import torch
from torch import nn

import fastai_cam.probe.guard as probe_guard_room


class Net(nn.Module):
    "Convolutions, a branch and a head: a layer inside it needs a recorded pass for its tail"
    def __init__(self):
        super().__init__()
        self.body, self.side, self.head = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
    def forward(self, x):
        x = self.body(x)
        return self.head((self.side(x) + x).mean((2, 3)))


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def image(n=2, size=(8, 12), seed=1): return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def state(model):
    "What a pass must leave as it was"
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_always_called), len(m._forward_hooks_with_kwargs)) for m in model.modules()]
    return dict(modes=[m.training for m in model.modules()], hooks=hooks, forwards=['forward' in vars(m) for m in model.modules()], grad=torch.is_grad_enabled(),
                inference=torch.is_inference_mode_enabled(), modes_of_functions=torch._C._len_torch_function_stack(), autocast=torch.is_autocast_enabled('cpu'), free=is_free(model))


def is_free(model):
    "Can another thread explain the model?"
    found = []
    def take():
        locks = probe_guard_room._locks_of(model)
        found.append(all(lock.acquire(timeout=.05) for lock in locks))
        for lock in locks[:len(locks)*found[0]]: lock.release()
    thread = threading.Thread(target=take)
    thread.start(); thread.join()
    return found[0]
