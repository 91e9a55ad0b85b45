"""Solution 7: a softmax over the others, asked about the positives."""
import torch
import torch.nn.functional as F


def nt_xent(embedding, label, tau):
    z = F.normalize(embedding, dim=-1)
    s = z @ z.T / tau
    itself = torch.eye(len(z), dtype=torch.bool)
    logp = s - torch.logsumexp(s.masked_fill(itself, -torch.inf), 1, keepdim=True)
    positive = (label[:, None] == label[None]) & ~itself
    return -((logp * positive).sum(1) / (positive.sum(1) + 1e-10)).mean()
