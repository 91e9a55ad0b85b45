"""Solution 5.

Summed, the log-ratio of an update is 28 times as large, so the ratio leaves 1 +- epsilon after a 28th of the
way: PPO clips three ratios in four or more (exercise 12 shows it) and learns from the others.
"""
import math


def chain_logprob(mean, std, chain, floor):
    std = std.clamp(min=floor)[:, None, None]                                             # [K', 1, 1]
    z = (chain[:, 1:] - mean) / std
    logp = -0.5 * z ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    return logp.clamp(-5, 2).mean((-1, -2))
