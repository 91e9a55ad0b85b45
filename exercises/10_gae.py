"""Exercise 10: how much better than expected? (diwa.py, section 6, gae)

Generalised advantage estimation (1506.02438, eq. 16), backwards through the T chunks of each of B dreams
(row t of every [T, B] tensor is chunk t):

    delta_t = reward_t + gamma * V(next state) - V(state)
    A_t     = delta_t + gamma * lam * A_{t+1}

Going backwards one carries A_{t+1} along: the *trace*.

Two things end a dream, and they are not the same.  *Terminated*: it succeeded, nothing is to be had after
it, so V(next state) counts as 0.  *Truncated*: its time was up, but an arm there would still have a
future, so V(next state) counts (next_value holds it, also where a dream ended).  After either kind of end
the next row belongs to another dream, which says nothing about this one.  After the last row there is no
A_{t+1}: the trace begins with 0.  Its V(next state) counts as in every other row: not after a success.

    python exercises/10_gae.py
"""
import sys

from verdict import judge


def gae(reward, value, next_value, terminated, truncated, gamma, lam):
    """All [T, B], terminated and truncated of bools; next_value: V of the state that followed, before any
    new dream began; gamma, lam: numbers -> advantage [T, B]"""
    raise NotImplementedError


if __name__ == "__main__":
    sys.exit(judge(__file__))
