"""Exercise 7: pull together what is alike (diwa.py, section 4, nt_xent).

The success classifier's embeddings are also trained by contrast (supervised NT-Xent, Khosla et al. 2020,
eq. 2): those of one class become alike, those of two classes become different.  With unit vectors
z = embedding / |embedding| and similarities s_ij = z_i . z_j / tau,

    loss = - mean over i of  mean over the positives j of i of  ( s_ij - log sum over k != i of exp(s_ik) )

The positives of i are the others of its class, without i itself.  Divide by (their number + 1e-10): one that
is alone in its class then counts as 0.

    python exercises/07_nt_xent.py
"""
import sys

from verdict import judge


def nt_xent(embedding, label, tau):
    """embedding [N, E], label [N] of integers, tau: a number -> the loss, a tensor without dimensions []"""
    raise NotImplementedError


if __name__ == "__main__":
    sys.exit(judge(__file__))
