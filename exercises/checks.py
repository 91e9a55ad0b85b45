"""checks.py: what must be so in each exercise, and mistakes that people make.  Try first, read it then.

Right answers are diwa.py's own functions, called with an exercise's arguments; those of exercises 1 and 2,
which are a line inside a function there, are that line's formula.
"""
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from verdict import Check, Property

import diwa


def gradient(scalar, of):
    """d scalar / d of; zeros where there is none."""
    if not scalar.requires_grad:
        return torch.zeros_like(of)
    found = torch.autograd.grad(scalar, of, allow_unused=True, retain_graph=True)[0]
    return torch.zeros_like(of) if found is None else found


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- 1  a gradient through a draw ---------------------------------------------------------------------------

def drawn():
    probs = draw(5, 3, 4).softmax(-1).requires_grad_()
    return probs, F.one_hot(torch.arange(15).reshape(5, 3) % 4, 4).float()


def draws_value(f):
    return {"z": f(*drawn())}


def draws_gradient(f):
    probs, one_hot = drawn()
    return {"the gradient of probs": gradient((f(probs, one_hot) * draw(5, 3, 4, seed=2)).sum(), probs)}


STRAIGHT_THROUGH = Check(
    name="straight_through",
    right=lambda probs, one_hot: one_hot + probs - probs.detach(),
    properties=[
        Property("the values are the draw's: one class, the others 0", draws_value,
                 "the values of z must be those of one_hot exactly: what you add to it must cancel"),
        Property("the gradient is that of the probabilities", draws_gradient,
                 "one_hot has no gradient of its own: add something of value 0 that has one"),
    ],
    mistakes=[
        ("the gradient is 0: one_hot alone has none, or two gradients of probs cancel; detach one of the two",
         lambda probs, one_hot: one_hot),
        ("these are the probabilities, no draw: a dream would go on with a blend of all classes",
         lambda probs, one_hot: probs),
        ("probs is added, but nothing takes its value away again: subtract probs.detach()",
         lambda probs, one_hot: one_hot + probs),
        ("the gradient has the wrong sign: it is the subtracted probs that must be detached",
         lambda probs, one_hot: one_hot + probs.detach() - probs),
        ("a product keeps the gradient of the drawn class only, and its value is a probability, not 1",
         lambda probs, one_hot: one_hot * probs),
    ],
    lesson="The forward pass sees a draw, the backward pass a soft choice.  It is biased, and it works.",
)


# --- 2  KL balance ------------------------------------------------------------------------------------------

def kl(p, q):
    """KL of two Gaussians of std 1 would be symmetric; these have stds: [N, 2 Z] -> [N]"""
    (m1, r1), (m2, r2) = p.chunk(2, -1), q.chunk(2, -1)
    s1, s2 = F.softplus(r1) + 0.1, F.softplus(r2) + 0.1
    return (torch.log(s2 / s1) + (s1 ** 2 + (m1 - m2) ** 2) / (2 * s2 ** 2) - 0.5).sum(-1)


def balanced(f, share, of):
    post, prior = draw(6, 4).requires_grad_(), draw(6, 4, seed=2).requires_grad_()
    value = f(kl, post, prior, share)
    return {"kl": value}[of] if of == "kl" else gradient(value.sum(), dict(prior=prior, post=post)[of])


SHARES = 0.8, 0.3

KL_BALANCE = Check(
    name="balanced_kl",
    right=lambda kl, post, prior, balance: (balance * kl(post.detach(), prior)
                                            + (1 - balance) * kl(post, prior.detach())),
    properties=[
        Property("the value is KL(posterior || prior), whatever the balance",
                 lambda f: {f"the value at {share}": balanced(f, share, "kl") for share in SHARES},
                 "both terms are KL(posterior || prior), one number a row, and their weights sum to 1"),
        Property("the prior gets `balance` of its gradient",
                 lambda f: {f"the prior's gradient at {s}": balanced(f, s, "prior") for s in SHARES},
                 "the term weighted by `balance` is the one in which the posterior stands still"),
        Property("the posterior gets the rest",
                 lambda f: {f"the posterior's gradient at {s}": balanced(f, s, "post") for s in SHARES},
                 "the term weighted by 1 - `balance` is the one in which the prior stands still"),
    ],
    mistakes=[
        ("detach() behind a whole KL leaves that term without any gradient: detach one of its two arguments",
         lambda kl, post, prior, balance: (balance * kl(post, prior)
                                           + (1 - balance) * kl(post, prior).detach())),
        ("the posterior must stand still in one term, and here it moves in both or in the wrong one",
         lambda kl, post, prior, balance: (balance * kl(post, prior.detach())
                                           + (1 - balance) * kl(post, prior))),
        ("the shares are swapped: now the posterior is pulled, four times as hard as the prior, to what is "
         "easy to foresee",
         lambda kl, post, prior, balance: (balance * kl(post, prior.detach())
                                           + (1 - balance) * kl(post.detach(), prior))),
        ("nothing is detached, so both learn alike and balance does nothing",
         lambda kl, post, prior, balance: balance * kl(post, prior) + (1 - balance) * kl(post, prior)),
        ("one .detach() is missing: in the second term the prior must stand still",
         lambda kl, post, prior, balance: (balance * kl(post.detach(), prior)
                                           + (1 - balance) * kl(post, prior))),
        ("one .detach() is missing: in the first term the posterior must stand still",
         lambda kl, post, prior, balance: (balance * kl(post, prior)
                                           + (1 - balance) * kl(post, prior.detach()))),
        ("detach() behind a whole KL leaves that term without any gradient: detach one of its two arguments",
         lambda kl, post, prior, balance: (balance * kl(post, prior).detach()
                                           + (1 - balance) * kl(post, prior))),
        ("this is KL(prior || posterior): a KL has a direction",
         lambda kl, post, prior, balance: (balance * kl(prior, post.detach())
                                           + (1 - balance) * kl(prior.detach(), post))),
        ("only the prior learns: the second term is missing",
         lambda kl, post, prior, balance: balance * kl(post.detach(), prior)),
        ("the two terms need weights that sum to 1",
         lambda kl, post, prior, balance: kl(post.detach(), prior) + kl(post, prior.detach())),
        ("everything is detached: a loss without a gradient",
         lambda kl, post, prior, balance: kl(post.detach(), prior.detach())),
    ],
    lesson="At .8 the prior is pulled to the posterior with four times the weight of the other way round.",
)


# --- 3  one denoising step ----------------------------------------------------------------------------------

def schedule(steps=20):
    cfg = diwa.Config(device="cpu", bc_steps=steps, bc_hidden=8)
    actor = diwa.DiffusionActor(cfg, 4)
    bar = actor.signal.double() ** 2
    before = torch.cat([torch.ones(1).double(), bar[:-1]])
    return actor, (1 - bar / before).float()


def posterior_mean(x, noise, t, beta):
    actor, _ = schedule(len(beta))
    return actor.mean(lambda *a: noise, x, t, None)


def denoised(f, t, scale):
    beta = schedule()[1]
    return {f"the mean at t = {t}": f(scale * draw(3, 4, 7), scale * draw(3, 4, 7, seed=2), t, beta)}


def mean_with(clip_guess=True, clip_mean=False, root=True, shift=0, swap=False):
    """The step with one thing changed."""
    def mistaken(x, noise, t, beta):
        bar = torch.cumprod(1 - beta, 0)
        before = bar[t - 1] if t else torch.ones(())
        if shift:
            before = bar[t]
        share = (1 - bar[t]).sqrt() if root else 1 - bar[t]
        clean = (x - share * noise) / bar[t].sqrt()
        if clip_guess:
            clean = clean.clamp(-1, 1)
        a, b = beta[t] * before.sqrt() / (1 - bar[t]), (1 - before) * (1 - beta[t]).sqrt() / (1 - bar[t])
        a, b = (b, a) if swap else (a, b)
        mean = a * clean + b * x
        return mean.clamp(-1, 1) if clip_mean else mean
    return mistaken


POSTERIOR_MEAN = Check(
    name="posterior_mean",
    right=posterior_mean,
    properties=[
        Property("at the last step (t = 0) the mean is the clean chunk itself",
                 lambda f: denoised(f, 0, 0.3),
                 "clean = (x - sqrt(1 - bar_t) noise) / sqrt(bar_t); at t = 0 bar_before is 1"),
        Property("in the middle of the chain it mixes the guess and x_t",
                 lambda f: denoised(f, 9, 0.3), "compare both coefficients with the text, root by root"),
        Property("one step before the end, bar_before is no longer 1",
                 lambda f: denoised(f, 1, 0.3), "at t = 1 bar_before is bar[0]; only at t = 0 it is 1"),
        Property("a guess outside [-1, 1] is clipped before it is used",
                 lambda f: denoised(f, 15, 3.0), "clip `clean`; the mean itself may lie outside"),
        Property("also at the last step",
                 lambda f: denoised(f, 0, 3.0), "clip `clean` at every t"),
    ],
    mistakes=[
        ("the guess of the clean chunk is not clipped: at noisy steps it is far out, and stays there",
         mean_with(clip_guess=False)),
        ("the mean is clipped instead of the guess of the clean chunk",
         mean_with(clip_guess=False, clip_mean=True)),
        ("noise enters with sqrt(1 - bar_t): its variance is 1 - bar_t", mean_with(root=False)),
        ("bar_before must be the product up to t - 1: with bar_t some noise stays at t = 0",
         mean_with(shift=1)),
        ("this is x_t, unchanged", lambda x, noise, t, beta: x),
        ("the two coefficients are swapped: the guess counts least when it is best", mean_with(swap=True)),
        ("this is the clean chunk's guess; one step goes only part of the way",
         lambda x, noise, t, beta: ((x - (1 - torch.cumprod(1 - beta, 0)[t]).sqrt() * noise)
                                    / torch.cumprod(1 - beta, 0)[t].sqrt()).clamp(-1, 1)),
    ],
    lesson="A diffusion policy is this line and some noise, 20 times, the last without noise.  PPO tunes "
           "where the last ten steps point.",
)


# --- 5  the log-probability of a chain ----------------------------------------------------------------------

def chain_logprob(mean, std, chain, floor):
    steps = mean.shape[1]
    actor = SimpleNamespace(ft_steps=steps, std=std.flip(0), mean=lambda *a: mean,
                            net=SimpleNamespace(see=lambda feature: feature),
                            cfg=SimpleNamespace(ft_std=floor))
    return diwa.DiffusionActor.chain_logprob(actor, mean[:, 0, 0], chain)


def chained(f, std, floor, far=0.1, gradient_too=False):
    mean = draw(2, 3, 4, 7).requires_grad_()
    steps = mean + far * draw(2, 3, 4, 7, seed=2)
    chain = torch.cat([draw(2, 1, 4, 7, seed=3), steps], 1).detach()
    logp = f(mean, torch.tensor(std), chain, floor)
    if gradient_too:
        return {"the gradient of the mean": gradient(logp.sum(), mean)}
    return {"the log-probability": logp}


def logprob_with(average=True, floored=True, clamped=True, first=1, squared=True, constant=True):
    def mistaken(mean, std, chain, floor):
        s = (std.clamp(min=floor) if floored else std)[:, None, None]
        x = chain[:, 1:] if first else chain[:, :-1]
        z = (x - mean) / s
        logp = -0.5 * (z ** 2 if squared else (x - mean) ** 2 / s) - s.log()
        logp = logp - 0.5 * math.log(2 * math.pi) * constant
        logp = logp.clamp(-5, 2) if clamped else logp
        return logp.mean((-1, -2)) if average else logp.sum((-1, -2))
    return mistaken


CHAIN_LOGPROB = Check(
    name="chain_logprob",
    right=chain_logprob,
    properties=[
        Property("each step's Gaussian is asked about what that step drew, averaged over the chunk",
                 lambda f: chained(f, [0.4, 0.3, 0.2], 0.1),
                 "-((x - mean) / std)^2 / 2 - log(std) - log(2 pi) / 2, of x = chain[:, j + 1] for step j"),
        Property("a std below the floor is lifted to it",
                 lambda f: chained(f, [0.4, 0.2, 1e-10], 0.1), "clamp std from below by `floor`"),
        Property("a number's log-density is at least -5",
                 lambda f: chained(f, [0.4, 0.2, 0.1], 0.1, far=1.0), "clamp before you average"),
        Property("and at most 2, where a std is small",
                 lambda f: chained(f, [0.05, 0.03, 0.02], 0.01, far=0.01),
                 "clamp to [-5, 2], and use the floor that is given"),
        Property("PPO can push the mean",
                 lambda f: chained(f, [0.4, 0.3, 0.2], 0.1, gradient_too=True), "nothing may be detached"),
    ],
    mistakes=[
        ("a chunk's numbers are summed: the ratio leaves the clip range 28 times as soon",
         logprob_with(average=False)),
        ("without the floor the last step's density is a needle: a gradient that explodes or is clamped away",
         logprob_with(floored=False)),
        ("it is not clamped to [-5, 2]: one far number, or a tiny std, decides the whole chunk's ratio",
         logprob_with(clamped=False)),
        ("this asks each step about its input: step j drew chain[:, j + 1]", logprob_with(first=0)),
        ("(x - mean) / std must be squared as a whole: you divide by std once", logprob_with(squared=False)),
        ("the steps' stds are in the wrong order", lambda mean, std, chain, floor:
         chain_logprob(mean, std.flip(0), chain, floor)),
        ("this takes the variance for the std", lambda mean, std, chain, floor:
         chain_logprob(mean, std.clamp(min=floor) ** 2, chain, 0.0)),
        ("a Gaussian's log-density also has -log sqrt(2 pi): a constant, but the clamp feels it",
         logprob_with(constant=False)),
    ],
    lesson="A sum over 28 numbers makes the log-ratio 28 times as large: the same update is clipped at once.",
)


# --- 7  contrast --------------------------------------------------------------------------------------------

def contrast(f, alone=False, scale=1.0, tau=0.5):
    label = torch.tensor([0, 0, 1, 1, 2] if alone else [0, 0, 0, 1, 1])
    return {"the loss": f(scale * draw(5, 8), label, tau)}


def nt_xent_with(unit=True, cold=True, itself="out", mean="positives"):
    def mistaken(embedding, label, tau):
        z = F.normalize(embedding, dim=-1) if unit else embedding
        s = z @ z.T / (tau if cold else 1)
        own = torch.eye(len(z), dtype=torch.bool)
        others = s if itself == "denominator" else s.masked_fill(own, -torch.inf)
        logp = s - torch.logsumexp(others, 1, keepdim=True)
        positive = label[:, None] == label[None]
        if itself != "positive":
            positive = positive & ~own
        count = positive.sum(1) + 1e-10 if mean == "positives" else len(z) - 1
        return -((logp * positive).sum(1) / count).mean()
    return mistaken


NT_XENT = Check(
    name="nt_xent",
    right=diwa.nt_xent,
    properties=[
        Property("two classes: each row against the others of its class",
                 contrast,
                 "s - logsumexp over all others, positives too, then minus the mean over the positives; nan "
                 "is -inf times 0 on the diagonal: mask the denominator only"),
        Property("the length of an embedding does not count",
                 lambda f: contrast(f, scale=3.0), "normalise to unit length first"),
        Property("tau divides the similarities",
                 lambda f: contrast(f, tau=0.1), "s = z . z / tau"),
        Property("one that is alone in its class counts as 0",
                 lambda f: contrast(f, alone=True),
                 "divide by the number of positives + 1e-10, then average over all rows"),
    ],
    mistakes=[
        ("the denominator contains the row itself, the most similar of all: no learning can lower that part",
         nt_xent_with(itself="denominator")),
        ("a row is not its own positive: it would be rewarded for being like itself",
         nt_xent_with(itself="positive")),
        ("without unit vectors the loss falls by making embeddings long", nt_xent_with(unit=False)),
        ("tau is missing: similarities of unit vectors lie within [-1, 1], too flat for a softmax",
         nt_xent_with(cold=False)),
        ("the inner mean is over the positives of a row, not over all other rows", nt_xent_with(mean="all")),
    ],
    lesson="A small tau looks at the nearest neighbours only; a large one moves everything a little.",
)


# --- 10  generalised advantage estimation -------------------------------------------------------------------

def advantages(f, ends, lam=0.95):
    """Six chunks of two dreams; ends: {(t, dream): "terminated" or "truncated"}"""
    reward, value, following = draw(6, 2), draw(6, 2, seed=2), draw(6, 2, seed=3)
    terminated, truncated = torch.zeros(2, 6, 2, dtype=torch.bool)
    for place, kind in ends.items():
        (terminated if kind == "terminated" else truncated)[place] = True
    following[:-1] = torch.where((terminated | truncated)[:-1], following[:-1], value[1:])
    return {"the advantage": f(reward, value, following, terminated, truncated, 0.9, lam)}


def gae_with(keep="success", cut=("terminated", "truncated"), peek=False, discounted=True):
    """keep: at which ends V(next state) counts as 0."""
    def mistaken(reward, value, next_value, terminated, truncated, gamma, lam):
        nowhere = torch.zeros_like(terminated)
        zero = dict(success=terminated, never=nowhere, always=terminated | truncated)[keep]
        stop = nowhere
        for name in cut:
            stop = stop | dict(terminated=terminated, truncated=truncated)[name]
        following = torch.cat([value[1:], next_value[-1:]]) if peek else next_value
        advantage = torch.zeros_like(reward)
        trace = torch.zeros_like(reward[0])
        for t in reversed(range(len(reward))):
            delta = reward[t] + gamma * following[t] * ~zero[t] - value[t]
            trace = delta + gamma * (lam if discounted else 1) * trace * ~stop[t]
            advantage[t] = trace
        return advantage
    return mistaken


GAE = Check(
    name="gae",
    right=lambda *a: diwa.gae(*a)[0],
    properties=[
        Property("dreams that do not end", lambda f: advantages(f, {}),
                 "A_t = delta_t + gamma * lam * A_{t+1}, from the last t"),
        Property("a dream that succeeds: nothing comes after",
                 lambda f: advantages(f, {(2, 0): "terminated"}),
                 "no V(next state), and no trace from the next row"),
        Property("a dream that is cut: its future counts, the next row does not",
                 lambda f: advantages(f, {(3, 1): "truncated"}),
                 "V(next state) stays, the trace from the next row goes"),
        Property("a success in the last row: nothing comes after it, either",
                 lambda f: advantages(f, {(5, 0): "terminated"}), "a success ends the future in every row"),
        Property("lam = 0 is the one-step advantage", lambda f: advantages(f, {(2, 0): "truncated"}, lam=0.0),
                 "with lam = 0 A_t is delta_t"),
    ],
    mistakes=[
        ("V(next state) counts after a success, too: the policy is promised what never comes",
         gae_with(keep="never")),
        ("a dream whose time was up is treated as one that failed for ever: V(next state) must count there",
         gae_with(keep="always")),
        ("the trace runs on into the next dream: cut it at every end", gae_with(cut=())),
        ("the trace is cut at successes only: a truncated dream's next row is another dream, too",
         gae_with(cut=("terminated",))),
        ("value[t + 1] is not next_value[t]: after an end it belongs to another dream's beginning",
         gae_with(peek=True)),
        ("lam is missing: the trace is then the whole return, with all its noise",
         gae_with(discounted=False)),
    ],
    lesson="Success ends the future, a time limit only ends our look at it.",
)


# --- 11  the clip schedule ----------------------------------------------------------------------------------

def along(steps):
    return torch.arange(steps) / (steps - 1) if steps > 1 else torch.ones(1)


def grown(share):
    return lambda first, last, steps: first + (last - first) * share(along(steps))


CLIP_SCHEDULE = Check(
    name="clip_schedule",
    right=lambda first, last, steps: diwa.clip_schedule(
        SimpleNamespace(ft_clip_first=first, ft_clip=last), steps, "cpu"),
    properties=[
        Property("ten steps, from first to last", lambda f: {"epsilon": f(0.003, 0.03, 10)},
                 "it is first at x = 0 and last at x = 1: is it (exp(3 x) - 1) / (exp(3) - 1), brackets "
                 "included, and does x run from 0 to 1?"),
        Property("it may also shrink", lambda f: {"epsilon": f(0.2, 0.1, 4)},
                 "first and last are the two ends, whichever is larger"),
        Property("with one step there is only the last", lambda f: {"epsilon": f(0.003, 0.03, 1)},
                 "steps - 1 is 0 there: x is 1"),
    ],
    mistakes=[
        ("this grows linearly: half-way it allows twice as much as the exponential", grown(lambda x: x)),
        ("it runs backwards: the noisiest step, which comes first, must have the tightest range",
         grown(lambda x: (torch.exp(3 * (1 - x)) - 1) / (math.exp(3) - 1))),
        ("a geometric series is exponential, too, but not this one", lambda first, last, steps:
         first * (last / first) ** along(steps)),
        ("without dividing by exp(3) - 1 it goes 19 times too far", grown(lambda x: torch.exp(3 * x) - 1)),
        ("with one step x must be 1: there is only the last step",
         lambda first, last, steps: first + (last - first) * (torch.exp(3 * torch.linspace(0, 1, steps)) - 1)
         / (math.exp(3) - 1)),
    ],
    lesson="With K' = 1 DPPO is PPO with one Gaussian around the executed chunk, and one epsilon.",
)


CHECKS = {
    "01_straight_through": STRAIGHT_THROUGH,
    "02_kl_balance": KL_BALANCE,
    "03_posterior_mean": POSTERIOR_MEAN,
    "05_chain_logprob": CHAIN_LOGPROB,
    "07_nt_xent": NT_XENT,
    "10_gae": GAE,
    "11_clip_schedule": CLIP_SCHEDULE,
}
