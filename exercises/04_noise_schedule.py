"""Exercise 4, an experiment: which noise? (diwa.py, section 3, DiffusionActor)

A schedule says how much noise each of the K steps adds, beta_t.  DDPM's is linear, from 0.0001 to 0.02,
and was made for K = 1000 steps: after them the product of all 1 - beta_t is 0.00004, nothing is left of
the data. DiWA denoises in K = 20 steps, with a cosine schedule.  What if one takes DDPM's line with 20
steps as it is? And stretched, times 1000 / 20, so that the betas of 20 steps add up to those of 1000?

Work it out first: what is the product of 1 - beta_t for either line of 20 steps?  From what does acting
start, and what has the network seen at its noisiest step?  Then write down what you expect of each cloned
policy, in percent of success, and guess whether the losses, which it prints, rank them the same way; and
run it: two minutes on a free core.

    python exercises/04_noise_schedule.py
"""
import sys

import torch
from lab import judge, success

import diwa

PREDICTION = dict(cosine=None, stretched=None, linear=None)
WHAT = dict(cosine="cloned with the cosine schedule", stretched="with DDPM's line, times 1000 / K",
            linear="with DDPM's line as it is")


def linear(K):
    return torch.linspace(0.0001, 0.02, K, dtype=torch.float64)


def stretched(K):
    return (linear(K) * 1000 / K).clamp(max=0.999)          # the last would be 1: nothing left to divide by


def actor_with(schedule):
    """DiffusionActor with other betas: all that follows from them, as in its __init__."""
    class Actor(diwa.DiffusionActor):
        def __init__(self, cfg, feature_size):
            super().__init__(cfg, feature_size)
            beta = schedule(self.K)
            bar = torch.cumprod(1 - beta, 0)                # share of the data's variance that is left
            before = torch.cat([torch.ones_like(bar[:1]), bar[:-1]])
            self.signal = bar.sqrt().float()
            self.noise = (1 - bar).sqrt().float()
            self.std = (beta * (1 - before) / (1 - bar)).clamp(min=1e-20).sqrt().float()
            self.coef_x0 = (beta * before.sqrt() / (1 - bar)).float()
            self.coef_xt = ((1 - before) * (1 - beta).sqrt() / (1 - bar)).float()
    return Actor


def experiment(lab):
    seen = dict(cosine=success(lab.episodes(lab.cfg(), "bc")))
    print(f"cosine: loss {lab.ends_at(lab.cfg(), 'bc', 'loss'):.3f}, {seen['cosine']:.0f} %")
    for schedule in (stretched, linear):
        name = schedule.__name__
        change = dict(DiffusionActor=actor_with(schedule))
        cfg = lab.variant(name, stages=["bc"], change=change)
        seen[name] = success(lab.episodes(cfg, "bc", change))
        print(f"{name}: loss {lab.ends_at(cfg, 'bc', 'loss'):.3f}, {seen[name]:.0f} %")
    return seen


if __name__ == "__main__":
    sys.exit(judge(__file__))
