"""Exercise 2: who moves towards whom? (diwa.py, section 2, balanced_kl)

The KL between posterior (what the frame shows) and prior (what was expected) has two ways to become small:
the prior learns to foresee, or the posterior no longer says anything that is hard to foresee.  We want the
first.  DreamerV2 (algorithm 2) trains both, but not alike:

    balance * KL(stop(posterior) || prior)  +  (1 - balance) * KL(posterior || stop(prior))

stop() is .detach().  The sum equals the KL for any balance; only the gradients are shared out.

    python exercises/02_kl_balance.py
"""
import sys

from verdict import judge


def balanced_kl(kl, post, prior, balance):
    """kl(p, q) -> KL(p || q) [N]; post, prior [N, S]: the S numbers that describe each distribution;
    balance: the prior's share of the gradient -> [N]"""
    raise NotImplementedError


if __name__ == "__main__":
    sys.exit(judge(__file__))
