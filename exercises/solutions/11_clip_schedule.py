"""Solution 11: x is 1 where there is only one step."""
import math

import torch


def clip_schedule(first, last, steps):
    x = torch.linspace(0, 1, steps) if steps > 1 else torch.ones(1)
    return first + (last - first) * (torch.exp(3 * x) - 1) / (math.exp(3) - 1)
