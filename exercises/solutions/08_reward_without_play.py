"""Solution 8: it takes the arm for the success, and practice may or may not find that out.

It believes half of what has failed, the usual reward one in eleven: in demonstrations, where the arm is tells
as much as where the door is, and the arm is easier to see.  The dream's success is near 100 % on every seed.
What that costs in the simulator is a matter of luck: the class run's policies solve 90, 87 and 85 % of the
same starts, these 88, 60 and 80 %.  At a door an arm hardly gets where a success leaves it unless it moves
the door; at a lever or a lamp it does (docs/EXPERIMENTS.md, "With ten demonstrations").  A reward that can be
deceived is a risk, not a certainty, and the dream's opinion does not tell which.
"""
PREDICTION = dict(believed=9, without_play_believed=50, without_play_simulator=76, without_play_dream=97)
SEEN = dict(                                                # percent; seeds 0, 1, 2
    believed=[3, 17, 6],                                    # of 92, 46 and 86 failures
    without_play_believed=[42, 67, 40],
    without_play_simulator=[88, 60, 80],                    # of 100 starts
    without_play_dream=[96, 96, 98],
)
