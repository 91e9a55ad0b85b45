"""Exercise 1: a gradient through a draw (diwa.py, section 2, sample_latent).

With --wm_latent categorical, as in DreamerV2, each latent is drawn: one class of C, as a one-hot vector.
(The tabletop's default is Gaussian: mean + std * noise has a gradient.)  A draw has none, but the encoder
must learn which class would have been better.  DreamerV2 (algorithm 1) lets the gradient pass "straight
through": the value of z is the draw, its gradient that of the probabilities.

You need one line, and .detach(), which keeps a tensor's value and drops its gradient.

    python exercises/01_straight_through.py
"""
import sys

from verdict import judge


def straight_through(probs, one_hot):
    """N rows of Z latents of C classes.  probs [N, Z, C]: probabilities, which carry the gradient;
    one_hot [N, Z, C]: what was drawn
    -> z [N, Z, C]: the values of one_hot, the gradient of probs"""
    raise NotImplementedError


if __name__ == "__main__":
    sys.exit(judge(__file__))
