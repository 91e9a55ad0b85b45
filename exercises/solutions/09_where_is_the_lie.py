"""Solution 9: the reward lies, where anything does; today's dream hardly.

Of the cloned policy's failures (35, 59 and 47 of 100, seeds 0, 1 and 2) the usual reward believes 2, 5 and 4
on the real frames.  A reward that has seen no play believes more on every seed, on frames, where no dream is
involved: 5, 12 and 6.  In the dream alone none of these is believed.  Of the tuned policy's failures (11, 10
and 17) the usual reward believes 0, 4 and 0, and 0, 1 and 0 more in the dream.  So on seed 1 practice has
done away with most of the failures that were seen through (54 before, 5 after), and not with those that were
believed (5 before, 5 after): these were paid.  On the other two seeds it has left none that is believed.

An older default (pixels alone, float32, the last weights) had more: 2, 3 and 0 failures of its tuned policies
were believed in the dream alone, and 2, 2 and 4 on the frames; which of the three it is, was not tried.  Test
a reward on the failures of both policies: on seed 1 those that practice left over are the believed ones, on
seeds 0 and 2 they are not.  They are few: one seed in three is a hint and no rule.
"""
PREDICTION = dict(cloned_frames=8, cloned_dream=0, without_play_frames=16, without_play_dream=0,
                  tuned_frames=13, tuned_dream=3)           # means of what we saw: no seed is like them
# Class runs of commit `cb678fa`: python exercises/09_where_is_the_lie.py --solution --run class0; and 1, 2
# From the learning curve's starts, not those of docs/RESULTS.md
SEEN = dict(                                                # percent of the failures; seeds 0, 1, 2
    cloned_frames=[6, 8, 9],
    cloned_dream=[0, 0, 0],
    without_play_frames=[14, 20, 13],
    without_play_dream=[0, 0, 0],
    tuned_frames=[0, 40, 0],
    tuned_dream=[0, 10, 0],
)
