"""Solution 1: what is added is worth 0, and carries the gradient."""


def straight_through(probs, one_hot):
    return one_hot + probs - probs.detach()
