"""Solution 8: it believes 27 to 67 % of what has failed; practice may or may not find that out.

Of the held-out stretches of play in which the door was not moved the usual reward believes 3 to 15 %, this
one 27 to 67 %: probably because in demonstrations the arm's place tells as much as the door's, and is easier
to see.  The dream's success is near 100 % on every seed.  In the simulator it is 0, -12 and +8 points beside
the class run's policies (89, 90, 83), which practised a third as long; so a cost may hide behind the longer
practice (54 iterations for the usual reward were not tried).  An older default lost 2, 27 and 5 points on
these seeds; with ten demonstrations, at a lever, another reward without labels, deceived in the same way,
cost everything (docs/EXPERIMENTS.md, "Ten demonstrations, a longer leash"); on three tasks and three seeds,
with the whole training, this one cost 4 points of 94 ("The method, part by part").  A reward that can be
deceived is a risk, not a certainty, and the dream's opinion does not tell which.
"""
PREDICTION = dict(believed=8, without_play_believed=43, tuned=87, without_play_simulator=86,
                  without_play_dream=98)
# Class runs of commit `cb678fa`: python exercises/08_reward_without_play.py --solution --run class0; and 1, 2
# From the learning curve's starts, not those of docs/RESULTS.md
SEEN = dict(                                                # percent; seeds 0, 1, 2
    believed=[3, 15, 7],                                    # of 92, 46 and 86 failures
    without_play_believed=[27, 67, 36],
    tuned=[89, 90, 83],                                     # of 100 starts, as are the next two
    without_play_simulator=[89, 78, 91],
    without_play_dream=[98, 98, 99],
)
