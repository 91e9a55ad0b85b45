"""Exercise 8, an experiment: a reward that has never seen play (diwa.py, section 8, reward_pairs)

The paper's classifier learns from demonstrations alone: their ends are success, what comes before is not.
Ours also sees play, without labels, as what success does not look like.  In demonstrations the door is
at the right only when the arm is there, too, and the arm is there only when the door is: so the arm's place
alone would explain success.  PPO will try all that is believed.

`--reward_labels demos` leaves play out.  A test first: stretches of held-out play in which the door is not
moved to the right, dreamed again; what share of them does each classifier take for a success?  Then a
policy that practises 54 iterations for what such a reward pays, three times as long as the class run: how
often does it succeed in the simulator, and how often in its dream?  And for comparison (`tuned`): how often
does the class run's own policy succeed in the simulator, from the same starts?  Write the five numbers down
in percent, and run it: three minutes on a free core.

    python exercises/08_reward_without_play.py
"""
import sys

from lab import dreamed, judge, success

PREDICTION = dict(believed=None, without_play_believed=None, tuned=None, without_play_simulator=None,
                  without_play_dream=None)
WHAT = dict(believed="held-out failures believed, by the usual reward",
            without_play_believed="by a reward that has seen no play",
            tuned="the class run's policy: in the simulator",
            without_play_simulator="the policy that it pays: in the simulator",
            without_play_dream="the same policy, in its dream")
FLAGS = "--reward_labels", "demos", "--ft_iterations", "54"


def experiment(lab):
    seen = dict(believed=lab.believed(lab.cfg()), tuned=success(lab.episodes(lab.cfg(), "tuned")))
    cfg = lab.variant("demos", *FLAGS, stages=["reward", "finetune"])
    seen["without_play_believed"] = lab.believed(cfg)
    episodes = lab.episodes(cfg, "tuned")
    return dict(seen, without_play_simulator=success(episodes), without_play_dream=dreamed(episodes))


if __name__ == "__main__":
    sys.exit(judge(__file__))
