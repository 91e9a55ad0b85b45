"""Solution 2: each term lets one side learn."""


def balanced_kl(kl, post, prior, balance):
    prior_learns = kl(post.detach(), prior)
    posterior_learns = kl(post, prior.detach())
    return balance * prior_learns + (1 - balance) * posterior_learns
