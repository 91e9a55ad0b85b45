"""Solution 10: a success ends the future, any end cuts the trace."""
import torch


def gae(reward, value, next_value, terminated, truncated, gamma, lam):
    advantage = torch.zeros_like(reward)
    trace = torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        delta = reward[t] + gamma * next_value[t] * ~terminated[t] - value[t]
        trace = delta + gamma * lam * trace * ~(terminated[t] | truncated[t])
        advantage[t] = trace
    return advantage
