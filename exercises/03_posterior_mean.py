"""Exercise 3: one denoising step (diwa.py, section 3, DiffusionActor.mean).

At step t a chunk is x_t = sqrt(bar_t) * clean + sqrt(1 - bar_t) * noise, where bar_t is the product of
(1 - beta) up to and including t.  A network has guessed the noise.  The step towards t - 1 has two halves:

    1. solve the line above for `clean`, and clip that guess to [-1, 1], for actions lie there;
    2. DDPM, eq. 7, with bar_before = bar_{t-1}; at t = 0 it is 1 (torch.ones(()): .sqrt() needs a tensor):
       mean = beta_t sqrt(bar_before) / (1 - bar_t) * clean
              + (1 - bar_before) sqrt(1 - beta_t) / (1 - bar_t) * x_t

Before you run it: what is the mean at t = 0?

    python exercises/03_posterior_mean.py
"""
import sys

from verdict import judge


def posterior_mean(x, noise, t, beta):
    """N chunks of H actions of A numbers.  x [N, H, A]: the chunk at step t; noise [N, H, A]: the network's
    guess; t: an int, K - 1 at the noisiest step, 0 at the last;
    beta [K] -> the mean of the chunk one step cleaner [N, H, A]"""
    raise NotImplementedError


if __name__ == "__main__":
    sys.exit(judge(__file__))
