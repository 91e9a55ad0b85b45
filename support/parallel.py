"""parallel.py: one world model, trained by several processes of torchrun's, each with its share of a batch.

    torchrun --nproc_per_node 4 diwa.py --stage wm

The engine is torch's DistributedDataParallel.  Every process draws the same batch, computes the loss of every
fourth sequence in it, and steps with the mean of all gradients, so all weights stay the same.  Process 0
writes, the others only compute.
"""
import os
import sys

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel


def number_of(name, alone):
    """What torchrun tells its processes; without it there is one."""
    return int(os.environ[name]) if dist.is_torchelastic_launched() else alone


def rank():
    """Which of the processes is this? 0 writes."""
    return number_of("RANK", 0)


def size():
    """How many are there?"""
    return number_of("WORLD_SIZE", 1)


def take_device(device):
    """Join the others; on a machine with several GPUs each process takes its own.  One of them prints."""
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if size() > 1:
        if device == "cuda":
            torch.cuda.set_device(number_of("LOCAL_RANK", 0))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


class Step(nn.Module):
    """A loss of a model as a module's forward, for that is what DistributedDataParallel listens to."""

    def __init__(self, model, loss):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch):
        return self.loss(self.model, batch, self.model.cfg)


def in_step(model, loss):
    """-> a function of a batch that returns loss(model, batch, model.cfg); behind its gradient stand all
    processes."""
    step = Step(model, loss)
    if size() > 1:
        return DistributedDataParallel(step, broadcast_buffers=False)       # the codes' never change
    return step


def share(batch):
    """Of the rows of a batch, those of this process."""
    return batch[rank()::size()]
