# SPDX-License-Identifier: Apache-2.0
"""Turns a vision-language model into a Gym Cards player: `train_agent.py`, under the name of its first domain.

accelerate launch examples/train_gym_cards.py --config examples/configs/demo.yaml
accelerate launch examples/train_gym_cards.py --game Blackjack --method vlmq --policy random --episodes 10000
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.train_agent import main

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from the newest checkpoint.")
