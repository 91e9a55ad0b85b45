"""Exercise 6, an experiment: is diffusion needed here? (diwa.py, section 3, GaussianActor)

The plain alternative is a network that says one chunk, its mean, and a Gaussian of fixed width around it:
behind the same interface a chain with a single link, so PPO is the same code.  It cannot say "either around
the handle with open fingers, or push it with closed ones": its mean of the two is between them.  On the other
hand it has fewer steps through which a gradient can go wrong.

The expert of the sliding door has just these two ways.  Write down what you expect, in percent of success, of
a Gaussian policy, cloned and tuned, beside the diffusion policy, and run it: three minutes on a
free core.

    python exercises/06_gaussian.py
"""
import sys

from lab import judge, success

PREDICTION = dict(cloned=None, tuned=None, gaussian_cloned=None, gaussian_tuned=None)
WHAT = dict(cloned="diffusion, cloned", tuned="diffusion, tuned in the dream",
            gaussian_cloned="a Gaussian, cloned", gaussian_tuned="a Gaussian, tuned in the dream")


def experiment(lab):
    cfg = lab.variant("gaussian", "--bc_actor", "gaussian", stages=["bc", "finetune"])
    return dict(cloned=success(lab.episodes(lab.cfg(), "bc")),
                tuned=success(lab.episodes(lab.cfg(), "tuned")),
                gaussian_cloned=success(lab.episodes(cfg, "bc")),
                gaussian_tuned=success(lab.episodes(cfg, "tuned")))


if __name__ == "__main__":
    sys.exit(judge(__file__))
