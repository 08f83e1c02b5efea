# SPDX-License-Identifier: Apache-2.0
"""VLM Q-Learning for TRL: off-policy reinforcement learning that turns vision-language models into agents."""

__version__ = "0.1.0.dev0"
