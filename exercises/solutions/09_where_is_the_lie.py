"""Solution 9: both lie, and practice leaves the believed failures over.

Of the cloned policy's failures (33, 48 and 46 of 100, seeds 0, 1 and 2) the usual reward believes 4, 2 and 4
on the real frames, and 2, 0 and 0 more in the dream.  A reward that has seen no play believes more on every
seed, on frames, where no dream is involved: 5, 13 and 6.  Of the tuned policy's failures (10, 13 and 15) the
usual reward believes 2, 2 and 4, and 2, 3 and 0 more in the dream.  So practice has done away with most of
the failures that were seen through (27, 46 and 42 before; 6, 8 and 11 after), and not with those that were
believed (6, 2 and 4 before; 4, 5 and 4 after): these were paid.  On seed 2 the lie is the reward's alone, on
seeds 0 and 1 the dream has half or more.

So test a reward on the failures of a policy that has practised for it, or the test is too easy.  They are
few: these shares are rough, and another seed's may look otherwise.
"""
PREDICTION = dict(cloned_frames=8, cloned_dream=2, without_play_frames=18, without_play_dream=7,
                  tuned_frames=21, tuned_dream=14)
# Class runs of an older default (commit `774d85c`: pixels alone, float32, the last weights); the learning
# curve's starts, not those of docs/RESULTS.md
SEEN = dict(                                                # percent of the failures; seeds 0, 1, 2
    cloned_frames=[12, 4, 9],
    cloned_dream=[6, 0, 0],
    without_play_frames=[15, 27, 13],
    without_play_dream=[12, 6, 2],
    tuned_frames=[20, 15, 27],
    tuned_dream=[20, 23, 0],
)
