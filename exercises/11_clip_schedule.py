"""Exercise 11: how far may each denoising step go? (diwa.py, section 6, clip_schedule)

PPO clips the ratio of new and old probability to 1 +- epsilon.  An early, noisy denoising step moves what all
later ones see, so DPPO gives it a tighter range: epsilon grows exponentially along the chain,

    epsilon(x) = first + (last - first) * (exp(3 x) - 1) / (exp(3) - 1),     x = 0 ... 1 over the K' steps

with `first` at the noisiest step.  With K' = 1 there is only the last step.

    python exercises/11_clip_schedule.py
"""
import sys

from verdict import judge


def clip_schedule(first, last, steps):
    """first, last: epsilon at the noisiest and at the last step; steps: K' >= 1 -> epsilon [K']"""
    raise NotImplementedError


if __name__ == "__main__":
    sys.exit(judge(__file__))
