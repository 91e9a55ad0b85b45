"""lecture.py: what a lecturer draws, from the code's own sizes.

    python exercises/lecture.py            prints the tables of docs/LECTURE.md
    python exercises/lecture.py --draw     and draws its figures into docs/pictures

Which loss trains which part is not claimed but asked: each is computed on made-up data and differentiated.
"""
import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import diwa

PARTS = {  # part of the world model: the names that its weights begin with
    "encoder": ("fuse",),
    "memory": ("gru", "from_z", "from_action", "norm"),
    "prior": ("prior",),
    "posterior": ("post_h", "post_e", "post_out"),
    "decoder": ("decoder", "pose_head"),
}


def made_up(cfg, B=3, T=6):
    """A batch of recorded windows."""
    told = cfg.wm_stride * 7
    sizes = dict(action=told, command=told, proprio=15, state=6, codes=cfg.wm_codes + cfg.wm_codes // 2)
    return {name: torch.randn(B, T, n) for name, n in sizes.items()}


def reached(loss, modules):
    """Which of the modules {name: parameters} has a gradient of this loss -> set of names"""
    found = set()
    for name, parameters in modules.items():
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        if any(g is not None and g.abs().sum() > 0 for g in grads):
            found.add(name)
    return found


def gradients(cfg):
    """Each loss and what it trains -> lines of a table"""
    torch.manual_seed(0)
    wm = diwa.WorldModel(cfg)
    named = list(wm.named_parameters())
    parts = {part: [p for name, p in named if name.split(".")[0] in names] for part, names in PARTS.items()}
    batch = made_up(cfg)
    context = torch.full((3,), 2)
    feature, (post, prior), dreamed = wm.rollout(wm.embed(batch), batch["action"], batch["command"], context)
    losses = {
        "image and pose, watched": wm.image_error(feature, batch).mean() + wm.proprio(feature).mean(),
        "image and pose, dreamed": wm.image_error(dreamed, batch)[:, 2:].mean() + wm.proprio(dreamed).mean(),
        "KL, the prior's share": diwa.kl_divergence(post.detach(), prior, cfg).mean(),
        "KL, the posterior's share": diwa.kl_divergence(post, prior.detach(), cfg).mean(),
    }
    frozen = feature[:, -1].detach()
    actor = diwa.build_actor(cfg, wm.feature_size)
    classifier = diwa.Classifier(cfg, wm.feature_size)
    critic = diwa.mlp([wm.feature_size, 8, 1], norm=False)
    heads = dict(policy=list(actor.net.parameters()), classifier=list(classifier.parameters()),
                 critic=list(critic.parameters()))
    chain = actor.sample_chain(frozen)
    rows = dict(feature=frozen, chain=chain, logprob=actor.chain_logprob(frozen, chain).detach() - 0.001,
                advantage=torch.randn(3), anchor=chain)
    rows["returns"] = torch.randn(3)
    chunk = torch.zeros(3, cfg.bc_chunk, 7)
    label = torch.tensor([0, 1, 1])
    losses["noise prediction (cloning)"] = actor.bc_loss(frozen, chunk)
    losses["contrast and cross-entropy"] = diwa.classifier_loss(classifier, frozen, frozen, label,
                                                                torch.ones(3), cfg)[0]
    losses["PPO: ratio, anchor and value"] = diwa.ppo_loss(cfg, actor, critic, rows)[0]
    columns = {**parts, **heads}
    lines = ["| loss | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, loss in losses.items():
        found = reached(loss, columns)
        lines.append(f"| {name} | " + " | ".join("x" if part in found else "" for part in columns) + " |")
    return lines


def sizes(cfg):
    """What has how many numbers -> lines of a table"""
    wm = diwa.WorldModel(cfg)
    actor = diwa.build_actor(cfg, wm.feature_size)

    def count(module):
        return f"{sum(p.numel() for p in module.parameters()):,}"

    return [
        "| what | size |",
        "|---|---|",
        f"| frame: two pictures | 2 x {cfg.image_size} x {cfg.image_size} x 3 |",
        f"| its codes, static and gripper | {cfg.wm_codes} + {cfg.wm_codes // 2} |",
        f"| embedding: codes through a network, and proprioception | {cfg.wm_embed} + 15 |",
        f"| memory h, guess z, command c | {cfg.wm_h} + {diwa.latent_size(cfg)} + 7 = {wm.feature_size}, "
        "the feature |",
        f"| chunk | {cfg.bc_chunk} actions of 7 = {7 * cfg.bc_chunk} |",
        f"| weights of the world model | {count(wm)} |",
        f"| weights of the denoiser | {count(actor.net)} |",
    ]


def times(cfg):
    """How the times nest: (name, how many of the next lower, control steps)"""
    steps = cfg.ft_horizon * cfg.bc_chunk
    return [
        ("iteration", f"{cfg.ft_dreams} dreams of {cfg.ft_chunks} chunks, then {cfg.ft_epochs} passes of PPO",
         steps),
        ("dream", f"at most {cfg.ft_horizon} chunks, until success", steps),
        ("chunk", f"{cfg.bc_steps} denoising steps make {cfg.bc_chunk} actions", cfg.bc_chunk),
        ("model step", f"{cfg.wm_stride} actions, one guess z", cfg.wm_stride),
        ("control step", "1 action, 1/30 s", 1),
    ]


def timeline(cfg):
    lines = ["| level | what it is | control steps |", "|---|---|---|"]
    return lines + [f"| {name} | {what} | {steps} |" for name, what, steps in times(cfg)]


def draw_times(cfg, path):
    from matplotlib.figure import Figure
    picture = Figure(figsize=(9, 3), layout="constrained")
    axes = picture.add_subplot()
    end = cfg.ft_horizon * cfg.bc_chunk
    for row, (name, what, steps) in enumerate(times(cfg)[1:]):
        for a in range(0, end, steps):
            axes.barh(-row, steps, left=a, height=0.6, color="C0", alpha=0.25 if a // steps % 2 else 0.5)
        axes.text(end + 1, -row, f"{name}: {what}", va="center", fontsize=8)
    axes.set(xlabel="control steps", yticks=[], xticks=range(0, end + 1, 12), xlim=(0, 1.9 * end))
    picture.savefig(path, dpi=120)


def draw_model(cfg, path):
    """The recurrent state-space model, unrolled: watching with frames, dreaming without."""
    from matplotlib.figure import Figure
    picture = Figure(figsize=(9, 4.2), layout="constrained")
    axes = picture.add_subplot()

    def box(x, y, words, color):
        style = dict(boxstyle="round", fc=color, ec="0.4")
        axes.text(x, y, words, ha="center", va="center", fontsize=8, bbox=style)

    def arrow(a, b, **style):
        look = dict(arrowstyle="->", color="0.3", shrinkA=16, shrinkB=16)
        axes.annotate("", b, a, arrowprops={**look, **style})

    for base, watching in ((3.2, True), (0, False)):
        for t in range(4):
            x = 2.2 * t
            box(x, base + 1, f"h{t}\n{cfg.wm_h}", "#cfe2f3")
            sees = watching or t == 0
            words = f"z{t} ~ {'posterior' if sees else 'prior'}\n{diwa.latent_size(cfg)}"
            box(x, base, words, "#d9ead3" if sees else "#fff2cc")
            arrow((x, base + 1), (x, base))
            if sees:
                box(x + 0.9, base - 0.75, "frame", "#eeeeee")
                arrow((x + 0.9, base - 0.75), (x, base))
            if t:
                arrow((x - 2.2, base + 1), (x, base + 1))
                arrow((x - 2.2, base), (x, base + 1), shrinkA=40)
                axes.text(x - 1.1, base + 1.25, f"a{t - 1}, c{t}", fontsize=7, ha="center")
        axes.text(-1.3, base + 0.5, "watching:\na robot" if watching else "dreaming:\npractice", ha="right",
                  va="center", fontsize=9)
    axes.set(xlim=(-2.6, 8), ylim=(-1.2, 4.8))
    axes.axis("off")
    picture.savefig(path, dpi=120)


def tables():
    cfg = diwa.Config(device="cpu")
    return [*sizes(cfg), "", *timeline(cfg), "", *gradients(cfg)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--draw", action="store_true", help="draw the figures into docs/pictures")
    given = parser.parse_args(argv)
    print("\n".join(tables()))
    if given.draw:
        cfg = diwa.Config(device="cpu")
        draw_times(cfg, ROOT / "docs/pictures/lecture_times.png")
        draw_model(cfg, ROOT / "docs/pictures/lecture_model.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
