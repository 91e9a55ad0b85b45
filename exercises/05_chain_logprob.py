"""Exercise 5: the log-probability of a denoising chain (diwa.py, section 3, chain_logprob).

DPPO's trick: each of the last K' denoising steps draws from a Gaussian, so each has a log-density that PPO
can push.  Step j turned chain[:, j] into chain[:, j + 1], with the mean that you are given.  Three details
decide whether it trains:

    - the std is never below a floor: DDPM's own is 0 at the last step;
    - each number's log-density is clamped to [-5, 2], so that no outlier dominates;
    - a chunk's H * A numbers are AVERAGED.

What would summing them do to PPO's ratio, exp(new - old), and so to how soon it is clipped?

    python exercises/05_chain_logprob.py
"""
import sys

from verdict import judge


def chain_logprob(mean, std, chain, floor):
    """B dreams, K' steps, H actions of A numbers.
    mean [B, K', H, A] and std [K']: of each step's Gaussian, the noisiest first;
    chain [B, K' + 1, H, A]: the first step's input, then what each step drew; floor: a number -> [B, K']"""
    raise NotImplementedError


if __name__ == "__main__":
    sys.exit(judge(__file__))
