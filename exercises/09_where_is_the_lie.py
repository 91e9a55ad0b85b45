"""Exercise 9, an experiment: where is the lie? (diwa.py, section 5, DreamEnv; section 7, Agent)

A policy fails in the simulator, and in the dream the same actions succeed.  Two parts can be wrong, and a
test tells them apart.  Let the agent watch the failed episode's real frames: if the classifier sees success
there, even at one chunk's end, the reward lies.  Let the world model dream the same actions from the first
frame: if the classifier sees success only there (in two steps running, the rule by which practice pays), the
dream lies: its door moves along.

Three groups of failures, by their names in PREDICTION:

    cloned          the cloned policy's, judged by the usual reward
    without_play    the same failures, judged by exercise 8's reward, which has seen no play
    tuned           those of the class run's tuned policy, judged by the usual reward

What percentage of each group is believed on the real frames (_frames), and what percentage in the dream only
(_dream)?  Write the six numbers down, and run it: two minutes on a free core.

    python exercises/09_where_is_the_lie.py
"""
import sys

from lab import judge, percent
from verdict import HERE, load

PREDICTION = dict(cloned_frames=None, cloned_dream=None, without_play_frames=None, without_play_dream=None,
                  tuned_frames=None, tuned_dream=None)
WHO = dict(cloned="failures of the cloned policy, the usual reward",
           without_play="the same, exercise 8's reward",
           tuned="failures of the tuned policy, the usual reward")
HOW = dict(frames="believed on the real frames", dream="only when the same actions are dreamed")
WHAT = {f"{who}_{how}": f"{WHO[who]}: {HOW[how]}" for who in WHO for how in HOW}
FLAGS = load(HERE / "08_reward_without_play.py").FLAGS


def experiment(lab):
    usual = lab.cfg()
    without_play = lab.variant("demos", *FLAGS, stages=["reward"])
    judges = dict(cloned=(usual, "bc"), without_play=(without_play, "bc"), tuned=(usual, "tuned"))
    seen = {}
    for name, (cfg, policy) in judges.items():
        failures = [e for e in lab.episodes(cfg, policy) if not e["success"]]
        frames = [any(e["real"]) for e in failures]
        dream_only = [any(e["dream"]) and not any(e["real"]) for e in failures]
        print(f"{WHO[name]}: {len(failures)} of {lab.starts}, believed on the frames {sum(frames)}, "
              f"in the dream only {sum(dream_only)}")
        seen[f"{name}_frames"] = percent(frames)
        seen[f"{name}_dream"] = percent(dream_only)
    return seen


if __name__ == "__main__":
    sys.exit(judge(__file__))
