"""The policy of one group of weights: draws of N of M without replacement, their probability and its gradient."""

from nmbench_plugins.maskpro.policy.distribution import grad_log_prob as grad_log_prob
from nmbench_plugins.maskpro.policy.distribution import greedy as greedy
from nmbench_plugins.maskpro.policy.distribution import log_prob as log_prob
from nmbench_plugins.maskpro.policy.distribution import sample as sample
