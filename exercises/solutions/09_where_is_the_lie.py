"""Solution 9: both lie, and practice keeps what is believed.

Of the cloned policy's failures (33, 48 and 46 of 100) the usual reward believes few, on the frames and in the
dream alike: it is good for what it was not asked to resist.  Of the tuned policy's (10, 13 and 15) it
believes two to four times as many: practice has done away with the failures that were seen through, and the
believed ones were paid.  That holds for either lie: on seeds 0 and 1 the dream's is the larger one, on seed 2
the reward's.  A reward that has seen no play is deceived more often on every seed, on the frames, too, where
no dream is involved.  So the failures on which a reward is tested must be the tuned policy's own, or the test
is too easy; and they are few, so the numbers here are rough.
"""
PREDICTION = dict(cloned_frames=8, cloned_dream=8, without_play_frames=18, without_play_dream=22,
                  tuned_frames=21, tuned_dream=33)
SEEN = dict(                                                # percent of the failures; seeds 0, 1, 2
    cloned_frames=[12, 4, 9],
    cloned_dream=[18, 2, 4],
    without_play_frames=[15, 27, 13],
    without_play_dream=[27, 31, 9],
    tuned_frames=[20, 15, 27],
    tuned_dream=[40, 38, 20],
)
