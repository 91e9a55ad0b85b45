"""Solution 8: it believes half of what has failed; practice may or may not find that out.

Of the held-out stretches of play in which the door was not moved the usual reward believes 3 to 17 %, this
one 40 to 67 %: probably because in demonstrations the arm's place tells as much as the door's, and is
easier to see.  The dream's success is near 100 % on every seed.  What it costs in the simulator is a
matter of luck: 88, 60 and 80 % from the same starts from which the class run's policies solve 90, 87 and
85.  On seed 0 nothing visible (90, 86, 88 % after 18, 36 and 54 iterations); with ten demonstrations, at a
lever, another reward without labels, deceived in the same way, cost everything (docs/EXPERIMENTS.md, "Ten
demonstrations, a longer leash"); on three tasks and three seeds of a later default it cost 4 points of 94
("The method, part by part").  54 iterations for the usual reward were not tried here.  A reward that
can be deceived is a risk, not a certainty, and the dream's opinion does not tell which.
"""
PREDICTION = dict(believed=9, without_play_believed=50, tuned=87, without_play_simulator=76,
                  without_play_dream=97)
# Class runs of an older default (commit `774d85c`: pixels alone, float32, the last weights); the learning
# curve's starts, not those of docs/RESULTS.md
SEEN = dict(                                                # percent; seeds 0, 1, 2
    believed=[3, 17, 6],                                    # of 92, 46 and 86 failures
    without_play_believed=[42, 67, 40],
    tuned=[90, 87, 85],                                     # of 100 starts, as are the next two
    without_play_simulator=[88, 60, 80],
    without_play_dream=[96, 96, 98],
)
