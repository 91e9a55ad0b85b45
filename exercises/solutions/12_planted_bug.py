"""Solution 12: which curve told.

A, the sum: `clipped` is .73 to .88, for a ratio of a sum leaves the clip range 28 times as soon, `kl` is
30 times the class run's and more, `anchor` is 28 times as large; PPO learns from the few ratios that are
left. B, frozen: `kl` and `clipped` are exactly 0, and success only trembles. C, the sign: everything looks
busy and healthy, and the dream's success falls, from .6 or .7 to about .1. D, the critic:
`explained` stays at 0, as of a constant.  The dream's success rises all the same, a little slower: without
a critic PPO compares each dream with the average of all, which is noisy and not wrong.  That is the
dangerous patient: a fault that only costs.

Seen alike with seeds 0, 1 and 2 (class runs of commit `cb678fa`), so there is no spread to show.
"""
PREDICTION = dict(A="sum", B="frozen", C="sign", D="critic")
SEEN = dict(PREDICTION)
