"""Exercise 12, an experiment: which training is sick? (diwa.py, section 6, ppo_iteration)

Reinforcement learning fails in silence: no line stops with an error, a policy merely does not improve.  What
tells is the curves.  Four patients practise for eight iterations, each with one fault of the list below or
with none; you see their curves beside those of the class run.  Do not read below the line.

    dream_success   share of the dreams whose first attempt succeeds
    kl              how far an iteration moves the policy: compare it with the class run's
    clipped         share of the ratios that leave PPO's clip range
    explained       share of the returns' variance that the critic foretells: 1 is perfect, 0 a constant
    anchor          minus the log-probability of the cloned policy's chunks: rises as the policy leaves it

The first two iterations train the critic alone.  The diagnoses to choose from:

    healthy         nothing is wrong
    sum             a chunk's log-probabilities are summed, not averaged
    sign            the advantage has the wrong sign
    critic          the critic never learns
    frozen          the actor never learns
    reward          the reward never comes

Run it (two minutes on a free core), write a diagnosis for each patient, run it again.

    python exercises/12_planted_bug.py
"""
import dataclasses
import sys

from lab import judge

import diwa

DIAGNOSES = ("healthy", "sum", "sign", "critic", "frozen", "reward")
PREDICTION = dict(A=None, B=None, C=None, D=None)
WHAT = {key: "the patient's illness" for key in PREDICTION}
CURVES = ("dream_success", "kl", "clipped", "explained", "anchor")


def experiment(lab):
    charts = {"the class run": lab.cfg()}
    for patient, illness in PATIENTS.items():
        flags = "--ft_iterations", "8"
        charts[f"patient {patient}"] = lab.variant(f"patient_{patient}", *flags, stages=["finetune"],
                                                   change=FAULTS[illness])
    for name, cfg in charts.items():
        print(f"\n{name}")
        for metric in CURVES:
            values = " ".join(f"{value:8.3g}" for value in lab.curve(cfg, "finetune", metric)[:8])
            print(f"  {metric:14s}{values}")
    return dict(PATIENTS)


# ---- The patients' files: do not read on before you have decided -------------------------------------------


class SummedActor(diwa.DiffusionActor):
    def chain_logprob(self, feature, chain):
        return super().chain_logprob(feature, chain) * chain[0, 0].numel()


def turned_gae(*args):
    advantage, returns = RIGHT["gae"](*args)
    return -advantage, returns


def deaf_loss(cfg, *args):
    return RIGHT["ppo_loss"](dataclasses.replace(cfg, ft_value=0.0), *args)


def idle_iteration(cfg, env, actor, critic, *optimizers):
    return RIGHT["ppo_iteration"](cfg, env, actor, critic, optimizers[0])


RIGHT = {name: getattr(diwa, name) for name in ("gae", "ppo_loss", "ppo_iteration")}
FAULTS = dict(
    healthy={},
    sum=dict(DiffusionActor=SummedActor),
    sign=dict(gae=turned_gae),
    critic=dict(ppo_loss=deaf_loss),
    frozen=dict(ppo_iteration=idle_iteration),
)
PATIENTS = dict(A="sum", B="frozen", C="sign", D="critic")

if __name__ == "__main__":
    sys.exit(judge(__file__))
