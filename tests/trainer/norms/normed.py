"""Replacement of norms for tests."""

from collections import OrderedDict
from copy import deepcopy

import torch
from torch import nn

from trainer.norms import replace_norms, trace_forward

IMAGE, TOKENS = (8, 5, 6), (7, 8)


def switch(model, norm, *shape, dtype=None):
    sample = torch.zeros(2, *shape, dtype=dtype)
    return replace_norms(model, norm, trace_forward(model, sample), sample)


def model_of(layer):
    return nn.Sequential(OrderedDict(first=nn.Identity(), norm=deepcopy(layer), last=nn.Identity()))
