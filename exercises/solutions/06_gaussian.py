"""Solution 6: a Gaussian clones about as well, and gains less from practice.

Cloned, it was 5, 7 and 17 points better on our seeds; tuned, 13, 15 and 1 points worse: 6 to 27 points
gained against 24 to 49.  It gained 18, 22 and 18 points less: that is what all three seeds agree on.  Cloned
better (+10 +- 8) and tuned worse (-10 +- 6) are more than chance if one counts episodes, but differ by seed;
with the whole training it clones the same.  The expert has two ways, yet the Gaussian is torn between them
in the first frames only: of the demonstrations' first frames its mean gripper lay between open and closed in
39 %, of later ones in 4 % and less (seed 0 of an older default), for then the feature shows which way was
begun.  Why it gains less?  Perhaps because a single link is all that PPO can push, with noise of the same
size in all 28 numbers, where the ten last denoising steps know what chunks look like.  On three tasks, with
the whole training (n = 900), it clones the same and is tuned 10 points worse, and diffusion of which only
the last step is tuned (`--ft_steps 1`) loses 6 (docs/EXPERIMENTS.md, "The method, part by part").  The paper
saw 52 % cloned and 84 % tuned with a Gaussian, mean of eight tasks.
"""
PREDICTION = dict(cloned=53, tuned=87, gaussian_cloned=63, gaussian_tuned=78)
# Class runs of commit `cb678fa`: python exercises/06_gaussian.py --solution --run class0; and 1, 2
# From the learning curve's starts, not those of docs/RESULTS.md
SEEN = dict(                                                # percent of 100 starts; seeds 0, 1, 2
    cloned=[65, 41, 53],
    tuned=[89, 90, 83],
    gaussian_cloned=[70, 48, 70],
    gaussian_tuned=[76, 75, 82],
)
